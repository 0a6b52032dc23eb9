// The functions that Python calls, see abi.h: single convolutions, and blocks that are gated by step gates.

#include <cstddef>
#include <string>

#include "abi.h"
#include "narrow.h"
#include "planes.h"

namespace {

constexpr int64_t GROUP = 16;  // images that share large weights
constexpr int64_t NEAR_VALUES = 1 << 17;  // values that stay in the second-level cache from one step to the next

// out[i] = bias[i] + sum over j of weight[i, j] * x[j] for i in [begin, end); weight (rows, n_in), x (n_in,). Four rows
// at a time hide the wait for memory.
void multiply_rows(const float* weight, const float* x, const float* bias, int64_t n_in, int64_t begin, int64_t end,
                   float* out) {
  for (int64_t r = begin; r < end; r += 4) {
    const int64_t last = end - 1;
    const float *a = weight + r * n_in, *b = weight + std::min(r + 1, last) * n_in;
    const float *c = weight + std::min(r + 2, last) * n_in, *d = weight + std::min(r + 3, last) * n_in;
    float sums[4] = {}, &s = sums[0], &t = sums[1], &u = sums[2], &v = sums[3];
#pragma omp simd reduction(+ : s, t, u, v)
    for (int64_t j = 0; j < n_in; ++j) s += a[j] * x[j], t += b[j] * x[j], u += c[j] * x[j], v += d[j] * x[j];
    for (int64_t i = 0; i < 4 && r + i < end; ++i) out[r + i] = bias[r + i] + sums[i];
  }
}

// The gates' logits (has_block + U,) for an image (C, H, W) of `pixels` = H * W.
std::vector<float> logits_of(const BlockStruct& block, const float* image, int64_t pixels, int64_t threads) {
  const int64_t n_logits = block.has_block + block.n_units;
  std::vector<float> pooled(block.channels), logits(n_logits);
  each_of(block.channels, block.channels * pixels, threads, [&](int64_t c) {
    float sum = 0.f;
    const float* plane = image + c * pixels;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < pixels; ++i) sum += plane[i];
    pooled[c] = sum / pixels;
  });
  parts_of(n_logits, n_logits * block.channels, threads, [&](int64_t begin, int64_t end) {
    multiply_rows(block.gate_weight, pooled.data(), block.gate_bias, block.channels, begin, end, logits.data());
  });
  return logits;
}

// Call one(i, threads) for each image or group of images. Threads share them; where there are fewer than threads, all
// threads share the work of each.
template <typename One>
void each_image(int64_t batch, int64_t threads, const One& one) {
  if (batch < threads) {
    for (int64_t i = 0; i < batch; ++i) one(i, threads);
    return;
  }
  Threads::share(threads, batch, [&](int64_t i) { one(i, 1); });
}

// One image within a block.
struct ImageState {
  const float *image, *residual;
  float* out;
  std::vector<int64_t> open = {};  // units, ascending
  std::vector<float> closed_predictions = {};  // (U,): max(z + threshold, 0) / 8 of closed units, 0 of open ones
  std::vector<float> compensated_bias = {};
};

// The activation of a step, or of a block.
template <typename Struct>
Bounds bounds_of(const Struct& it) {
  return {it.lowest, it.highest, it.activation, it.parameter};
}

// Ask the gates what an image opens. Return false if it skips the branch; its result is then there.
bool choose_open(const BlockStruct& block, ImageState& state, int64_t pixels, int64_t n_results, int64_t threads) {
  if (!block.gate_weight) return true;
  const std::vector<float> logits = logits_of(block, state.image, pixels, threads);
  if (block.has_block && logits[0] <= 0.f) {
    const Bounds bounds = bounds_of(block);
    for (int64_t i = 0; i < n_results; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, n_results - i);
      store(state.out + i, bounds.clamp(load(state.residual + i, count)), count);
    }
    return false;
  }
  const float* unit_logits = logits.data() + block.has_block;
  for (int64_t u = 0; u < block.n_units; ++u)
    if (unit_logits[u] > 0.f) state.open.push_back(u);
  if (block.compensation) {
    state.closed_predictions.resize(block.n_units);
    for (int64_t u = 0; u < block.n_units; ++u)
      state.closed_predictions[u] =
          unit_logits[u] > 0.f ? 0.f : std::max(unit_logits[u] + block.threshold[u], 0.f) / 8;
  }
  return true;
}

// compensated_bias = bias + sum over closed units of prediction * compensation, for output channels [begin, end).
void compensate(const BlockStruct& block, ImageState& state, const float* bias, int64_t oc_total, int64_t begin,
                int64_t end) {
  float* to = state.compensated_bias.data();
  for (int64_t c = begin; c < end; ++c) to[c] = bias ? bias[c] : 0.f;
  for (int64_t u = 0; u < block.n_units; ++u) {
    const float prediction = state.closed_predictions[u], *weight = block.compensation + u * oc_total;
    if (prediction == 0.f) continue;
    for (int64_t c = begin; c < end; ++c) to[c] += prediction * weight[c];
  }
}

Layout layout_of(const StepStruct& step, int64_t height, int64_t width) {
  return {height, width, step.kernel, step.stride, step.padding};
}

// The shape of an image.
struct Size {
  int64_t channels, height, width;
  int64_t values() const { return channels * height * width; }
  Size after(const BlockStruct& block) const {
    Size size = *this;
    for (const StepStruct* step = block.steps; step < block.steps + block.n_steps; ++step) {
      const Layout layout = layout_of(*step, size.height, size.width);
      size = {step->oc_total, layout.out_height, layout.out_width};
    }
    return size;
  }
};

// The operands of a step for one image; see `Convolution`.
struct Operands {
  const float *image, *bias;
  const int64_t *oc, *ic;
  const float* residual;
  float* out;
  int64_t n_in, n_out;
};

// Run a step for images of one size.
void run_step(const StepStruct& step, const std::vector<Operands>& all, const Layout& layout, int64_t threads) {
  const Bounds bounds = bounds_of(step);
  std::vector<Convolution> convolutions;
  std::vector<NarrowConvolution> narrow;
  for (const Operands& it : all)
    if (step.kind == MAX_POOLING) MaxPooling{it.image, it.out, it.n_out, layout}.run(threads);
    else if (step.kind == DEPTHWISE)
      DepthwiseConvolution{it.image, step.weight, it.bias, it.oc, it.out, it.n_out, layout, bounds}.run(threads);
    else if (step.packed_weight && it.n_out == step.oc_total)
      narrow.push_back({it.image, step.packed_weight, it.bias, it.ic, it.residual, it.out, it.n_in, it.n_out,
                        step.ic_total, layout.height, layout.width, bounds});
    else
      convolutions.push_back({it.image, step.weight, it.bias, it.oc, it.ic, it.residual, it.out, it.n_in, it.n_out,
                              step.ic_total, layout, bounds});
  if (!narrow.empty()) NarrowConvolution::run(narrow, threads);
  if (threads == 1 && convolutions.size() > 1) Convolution::run(convolutions);
  else
    for (const Convolution& convolution : convolutions) convolution.run(threads);
}

// Run a convolution 1 x 1 and the depthwise one behind it for one image, group by group of channels, so that what lies
// between them stays in a cache. Threads share the groups.
void run_pair(const StepStruct& first, const Operands& from, const Layout& layout, const StepStruct& second,
              const Operands& to, const Layout& second_layout, int64_t threads) {
  const int64_t near = std::max<int64_t>(1, NEAR_VALUES / layout.pixels / MAX_OC) * MAX_OC;
  const int64_t group = std::min(near, (from.n_out + threads - 1) / threads);
  if (!group) return;
  Threads::share(threads, (from.n_out + group - 1) / group, [&](int64_t i) {
    static thread_local Scratch kept;
    const int64_t begin = i * group, n_out = std::min(group, from.n_out - begin);
    float* map = kept.need(n_out * layout.pixels);
    Convolution{from.image, first.weight, from.bias, from.oc + begin, from.ic, nullptr, map, from.n_in, n_out,
                first.ic_total, layout, bounds_of(first)}
        .run(1);
    DepthwiseConvolution{map, second.weight, to.bias, to.oc + begin, to.out + begin * second_layout.pixels, n_out,
                         second_layout, bounds_of(second)}
        .run(1);
  });
}

// 0, 1, 2, ... up to the number of channels of any step: oc and ic where nothing is closed.
const int64_t* all_channels_of(const BlockStruct& block) {
  static thread_local std::vector<int64_t> all;
  int64_t most = block.projection ? std::max(block.projection->oc_total, block.projection->ic_total) : 0;
  for (const StepStruct* s = block.steps; s < block.steps + block.n_steps; ++s)
    most = std::max({most, s->oc_total, s->ic_total});
  for (int64_t i = all.size(); i < most; ++i) all.push_back(i);
  return all.data();
}

// Run images of one size through a block, step by step.
void run_block(const BlockStruct& block, std::vector<ImageState> states, Size size, int64_t threads) {
  const int64_t* all_channels = all_channels_of(block);
  const int64_t n_results = size.after(block).values();
  int64_t height = size.height, width = size.width;
  if (block.projection) {
    const StepStruct& projection = *block.projection;
    std::vector<Operands> operands;
    for (ImageState& state : states) {
      operands.push_back({state.image, projection.bias, all_channels, all_channels, nullptr, state.out,
                          projection.ic_total, projection.oc_total});
      state.residual = state.out;  // the branch is added to it in place
    }
    run_step(projection, operands, layout_of(projection, height, width), threads);
  }
  std::vector<ImageState> running;
  for (ImageState& state : states)
    if (choose_open(block, state, height * width, n_results, threads)) running.push_back(std::move(state));
  if (running.empty()) return;
  static thread_local std::vector<Scratch> buffers;  // two for each image
  buffers.resize(std::max(buffers.size(), 2 * running.size()));
  std::vector<Operands> waiting;  // of a step that runs together with the next one
  int64_t turn = 0;
  for (int64_t k = 0; k < block.n_steps; ++k) {
    const StepStruct& step = block.steps[k];
    const bool last = k + 1 == block.n_steps;
    const Layout layout = layout_of(step, height, width);
    const bool waits =
        !last && layout.is_plain && step.kind == CONVOLUTION && block.steps[k + 1].kind == DEPTHWISE;
    std::vector<Operands> operands;
    for (size_t i = 0; i < running.size(); ++i) {
      ImageState& state = running[i];
      const int64_t n_out = step.open_oc ? state.open.size() : step.oc_total;
      const int64_t n_in = step.open_ic ? state.open.size() : step.ic_total;
      const float* bias = step.bias;
      if (step.compensated) {
        state.compensated_bias.resize(step.oc_total);
        parts_of(step.oc_total, step.oc_total * block.n_units, threads, [&](int64_t begin, int64_t end) {
          compensate(block, state, bias, step.oc_total, begin, end);
        });
        bias = state.compensated_bias.data();
      }
      float* to = last ? state.out : waits ? nullptr : buffers[2 * i + turn % 2].need(n_out * layout.pixels);
      operands.push_back({state.image, bias, step.open_oc ? state.open.data() : all_channels,
                          step.open_ic ? state.open.data() : all_channels, last ? state.residual : nullptr, to, n_in,
                          n_out});
      state.image = to;
    }
    turn += !waits;
    if (waits) waiting = std::move(operands);
    else if (waiting.empty()) run_step(step, operands, layout, threads);
    else {
      const StepStruct& former = block.steps[k - 1];  // 1 x 1: its map is of the size that this step reads
      for (size_t i = 0; i < running.size(); ++i)
        run_pair(former, waiting[i], layout_of(former, height, width), step, operands[i], layout, threads);
      waiting.clear();
    }
    height = layout.out_height, width = layout.out_width;
  }
}

// Tell whether a block's result may take the place of its input: only the first of several steps reads the input, and
// the last one adds to it.
bool in_place(const BlockStruct& block) { return block.adds_input && block.n_steps > 1; }

// Run images of one size through blocks. Each state brings the first block's residual.
void run_blocks(const BlockStruct* blocks, int64_t n_blocks, std::vector<ImageState> states, Size size,
                int64_t threads) {
  static thread_local std::vector<Scratch> between;  // two for each image
  between.resize(std::max(between.size(), 2 * states.size()));
  int64_t moves = 0;  // results to come in memory of their own
  for (int64_t b = 1; b < n_blocks; ++b) moves += !in_place(blocks[b]);
  std::vector<float*> ends;
  for (const ImageState& state : states) ends.push_back(state.out);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const Size after = size.after(blocks[b]);
    if (b) moves -= !in_place(blocks[b]);
    for (size_t i = 0; i < states.size(); ++i) {
      ImageState& state = states[i];
      if (b) state.image = state.out;
      if (b) state.residual = blocks[b].adds_input ? state.image : nullptr;
      if (!b || !in_place(blocks[b])) state.out = moves ? between[2 * i + moves % 2].need(after.values()) : ends[i];
    }
    run_block(blocks[b], states, size, threads);
    size = after;
  }
}

// Tell whether a block's weights are so large that images should share them while they are near. Blocks without a
// residual count as small: they may begin with maps of which several would fill a cache.
bool is_large(const BlockStruct& block) {
  const bool has_residual = block.adds_input || block.projection;
  return has_residual && std::any_of(block.steps, block.steps + block.n_steps, [](const StepStruct& s) {
    return s.kernel == 3 && s.kind == CONVOLUTION && s.oc_total * s.ic_total * 9 > NEAR_WEIGHTS;
  });
}

// A constant and its value, a struct and its size, or a field, its offset and its size.
struct AbiEntry {
  const char* name;
  int64_t value, size;
};

#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(type::field)}
constexpr AbiEntry ABI[] = {
    {"PACKED_OC", PACKED_OC, 0},
    {"CONVOLUTION", CONVOLUTION, 0},
    {"DEPTHWISE", DEPTHWISE, 0},
    {"MAX_POOLING", MAX_POOLING, 0},
    {"CLAMP", CLAMP, 0},
    {"SILU", SILU, 0},
    {"HARDSWISH", HARDSWISH, 0},
    {"GELU", GELU, 0},
    {"GELU_TANH", GELU_TANH, 0},
    {"LEAKY_RELU", LEAKY_RELU, 0},
    {"ELU", ELU, 0},
    {"StepStruct", sizeof(StepStruct), 0},
    FIELD(StepStruct, weight),
    FIELD(StepStruct, bias),
    FIELD(StepStruct, packed_weight),
    FIELD(StepStruct, oc_total),
    FIELD(StepStruct, ic_total),
    FIELD(StepStruct, kernel),
    FIELD(StepStruct, stride),
    FIELD(StepStruct, padding),
    FIELD(StepStruct, kind),
    FIELD(StepStruct, open_oc),
    FIELD(StepStruct, open_ic),
    FIELD(StepStruct, compensated),
    FIELD(StepStruct, activation),
    FIELD(StepStruct, parameter),
    FIELD(StepStruct, lowest),
    FIELD(StepStruct, highest),
    {"BlockStruct", sizeof(BlockStruct), 0},
    FIELD(BlockStruct, gate_weight),
    FIELD(BlockStruct, gate_bias),
    FIELD(BlockStruct, compensation),
    FIELD(BlockStruct, threshold),
    FIELD(BlockStruct, channels),
    FIELD(BlockStruct, has_block),
    FIELD(BlockStruct, n_units),
    FIELD(BlockStruct, n_steps),
    FIELD(BlockStruct, adds_input),
    FIELD(BlockStruct, steps),
    FIELD(BlockStruct, projection),
    FIELD(BlockStruct, activation),
    FIELD(BlockStruct, parameter),
    FIELD(BlockStruct, lowest),
    FIELD(BlockStruct, highest),
};
#undef FIELD

}  // namespace

extern "C" {

int64_t gathered_abi_version() { return ABI_VERSION; }

const char* gathered_abi_layout() {
  static const std::string text = [] {
    std::string lines;
    for (const AbiEntry& entry : ABI) {
      lines += entry.name + (" " + std::to_string(entry.value));
      if (entry.size) lines += " " + std::to_string(entry.size);
      lines += "\n";
    }
    return lines;
  }();
  return text.c_str();
}

int64_t gathered_narrow(int64_t width) { return LANES == PACKED_OC && NarrowConvolution::fits(width); }

void gathered_conv(const float* images, const float* weight, const float* bias, const int64_t* oc, const int64_t* ic,
                   const float* residual, float* out, int64_t batch, int64_t n_in, int64_t height, int64_t width,
                   int64_t n_out, int64_t ic_total, int64_t kernel, int64_t stride, int64_t padding, float lowest,
                   float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t from = n_in * height * width, to = n_out * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    Convolution{images + i * from, weight, bias, oc, ic, residual ? residual + i * to : nullptr, out + i * to, n_in,
                n_out, ic_total, layout, {lowest, highest}}
        .run(share);
  });
}

void gathered_depthwise(const float* images, const float* weight, const float* bias, const int64_t* oc, float* out,
                        int64_t batch, int64_t n_out, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                        int64_t padding, float lowest, float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t from = n_out * height * width, to = n_out * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    DepthwiseConvolution{images + i * from, weight, bias, oc, out + i * to, n_out, layout, {lowest, highest}}
        .run(share);
  });
}

// Blocks with large weights run several images at once, other blocks one image while it is in a cache; so runs of the
// two take turns.
void gathered_blocks(const BlockStruct* blocks, int64_t n_blocks, const float* images, const float* residual,
                     float* out, int64_t batch, int64_t height, int64_t width, int64_t threads) {
  if (!batch) return;
  static thread_local Scratch turns[2];
  Size size = {blocks->channels, height, width};
  for (int64_t begin = 0, end, turn = 0; begin < n_blocks; begin = end, ++turn) {
    const bool large = is_large(blocks[begin]);
    Size after = size;
    for (end = begin; end < n_blocks && is_large(blocks[end]) == large; ++end) after = after.after(blocks[end]);
    const int64_t from = size.values(), to = after.values(), residual_size = size.after(blocks[begin]).values();
    float* result = end < n_blocks ? turns[turn % 2].need(batch * to) : out;
    const float* residuals = !begin ? residual : blocks[begin].adds_input ? images : nullptr;
    const int64_t rounds = (batch + threads * GROUP - 1) / (threads * GROUP);
    const int64_t group = large ? (batch + threads * rounds - 1) / (threads * rounds) : 1;  // as many for each thread
    each_image((batch + group - 1) / group, threads, [&](int64_t g, int64_t share) {
      std::vector<ImageState> states;
      for (int64_t i = g * group; i < std::min(batch, (g + 1) * group); ++i)
        states.push_back({images + i * from, residuals ? residuals + i * residual_size : nullptr, result + i * to});
      run_blocks(blocks + begin, end - begin, std::move(states), size, share);
    });
    images = result, size = after;
  }
}

}  // extern "C"
