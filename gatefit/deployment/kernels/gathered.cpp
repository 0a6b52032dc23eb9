// Gated blocks, and the convolutions they are made of, for batches of images; called from Python.

#include "narrow.h"
#include "planes.h"

namespace {

constexpr int64_t GROUP = 16;  // images that share large weights
constexpr int64_t NEAR = 1 << 17;  // values that stay in the second-level cache from one step to the next

enum Kind : int64_t { CONVOLUTION, DEPTHWISE, MAX_POOLING };

// A convolution in the chain of a branch; open_rows and open_columns say whether the open units are its rows, columns.
struct Step {
  const float *weight, *bias, *narrow;  // narrow: the weight as `NarrowConvolution` wants it, or null
  int64_t rows, columns, kernel, stride, padding, kind, open_rows, open_columns, filled;
  float lowest, highest;
};

// A block whose branch is a chain of convolutions, and its gates: one layer for both, (has_block + units, features); null
// where nothing is gated. The branch is added to the block's input if `adds`; if there is an `aside`, to what that one
// makes of the input; else to nothing.
struct Block {
  const float *gate_weight, *gate_bias, *fill, *lowered;  // fill (units, channels), or null
  int64_t features, has_block, units, steps, adds;
  const Step *step, *aside;
  float lowest, highest;  // behind the sum
};

// bias + weight x for rows [begin, end) of a matrix (rows, count). Four at a time hide the wait for memory.
void multiply_rows(const float* weight, const float* x, const float* bias, int64_t count, int64_t begin, int64_t end,
                   float* out) {
  for (int64_t r = begin; r < end; r += 4) {
    const int64_t last = end - 1;
    const float *a = weight + r * count, *b = weight + std::min(r + 1, last) * count;
    const float *c = weight + std::min(r + 2, last) * count, *d = weight + std::min(r + 3, last) * count;
    float sums[4] = {}, &s = sums[0], &t = sums[1], &u = sums[2], &v = sums[3];
#pragma omp simd reduction(+ : s, t, u, v)
    for (int64_t i = 0; i < count; ++i) s += a[i] * x[i], t += b[i] * x[i], u += c[i] * x[i], v += d[i] * x[i];
    for (int64_t i = 0; i < 4 && r + i < end; ++i) out[r + i] = bias[r + i] + sums[i];
  }
}

std::vector<float> logits_of(const Block& block, const float* image, int64_t pixels, int64_t threads) {
  const int64_t count = block.has_block + block.units;
  std::vector<float> pooled(block.features), logits(count);
  each_of(block.features, block.features * pixels, threads, [&](int64_t c) {
    float sum = 0.f;
    const float* plane = image + c * pixels;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < pixels; ++i) sum += plane[i];
    pooled[c] = sum / pixels;
  });
  parts_of(count, count * block.features, threads, [&](int64_t begin, int64_t end) {
    multiply_rows(block.gate_weight, pooled.data(), block.gate_bias, block.features, begin, end, logits.data());
  });
  return logits;
}

// Call one(i, threads) for each image, or group of them: the threads share them, or where those are few, each one.
template <typename One>
void each_image(int64_t batch, int64_t threads, const One& one) {
  if (batch < threads) {
    for (int64_t i = 0; i < batch; ++i) one(i, threads);
    return;
  }
  Threads::share(threads, batch, [&](int64_t i) { one(i, 1); });
}

// One image on its way through a block's branch.
struct Work {
  const float *image, *shortcut;
  float* out;
  std::vector<int64_t> open = {};
  std::vector<float> left = {}, shifted = {};
};

// Let an image's gates, which are steps, say what it opens. False: the block is skipped, and the image done.
bool opens(const Block& block, Work& work, int64_t pixels, int64_t total, int64_t threads) {
  if (!block.gate_weight) return true;
  const std::vector<float> logits = logits_of(block, work.image, pixels, threads);
  if (block.has_block && logits[0] <= 0.f) {
    for (int64_t i = 0; i < total; ++i) work.out[i] = std::min(std::max(work.shortcut[i], block.lowest), block.highest);
    return false;
  }
  const float* units = logits.data() + block.has_block;
  for (int64_t u = 0; u < block.units; ++u)
    if (units[u] > 0.f) work.open.push_back(u);
  if (block.fill) {
    work.left.resize(block.units);
    for (int64_t u = 0; u < block.units; ++u)
      work.left[u] = units[u] > 0.f ? 0.f : std::max(units[u] + block.lowered[u], 0.f) / 8;
  }
  return true;
}

// bias + what closed units leave behind, for channels [begin, end) of `channels`.
void fill(const Block& block, Work& work, const float* bias, int64_t channels, int64_t begin, int64_t end) {
  float* to = work.shifted.data();
  for (int64_t c = begin; c < end; ++c) to[c] = bias ? bias[c] : 0.f;
  for (int64_t u = 0; u < block.units; ++u) {
    const float left = work.left[u], *weight = block.fill + u * channels;
    if (left == 0.f) continue;
    for (int64_t c = begin; c < end; ++c) to[c] += left * weight[c];
  }
}

Layout layout_of(const Step& step, int64_t height, int64_t width) {
  return {height, width, step.kernel, step.stride, step.padding};
}

// Of an image on its way.
struct Size {
  int64_t channels, height, width;
  int64_t values() const { return channels * height * width; }
  Size behind(const Block& block) const {
    Size size = *this;
    for (const Step* step = block.step; step < block.step + block.steps; ++step) {
      const Layout layout = layout_of(*step, size.height, size.width);
      size = {step->rows, layout.out_height, layout.out_width};
    }
    return size;
  }
};

// What a step is given for one image; see `Convolution`.
struct Given {
  const float *image, *bias;
  const int64_t *rows, *columns;
  const float* added;
  float* out;
  int64_t channels, count;
};

// A step for images side by side.
void run_step(const Step& step, const std::vector<Given>& all, const Layout& layout, int64_t threads) {
  const Bounds bounds = {step.lowest, step.highest};
  std::vector<Convolution> convolutions;
  std::vector<NarrowConvolution> narrow;
  for (const Given& it : all)
    if (step.kind == MAX_POOLING) MaxPooling{it.image, it.out, it.count, layout}.run(threads);
    else if (step.kind == DEPTHWISE)
      DepthwiseConvolution{it.image, step.weight, it.bias, it.rows, it.out, it.count, layout, bounds}.run(threads);
    else if (step.narrow && it.count == step.rows)
      narrow.push_back({it.image, step.narrow, it.bias, it.columns, it.added, it.out, it.channels, it.count, step.columns,
                        layout.height, layout.width, bounds});
    else
      convolutions.push_back({it.image, step.weight, it.bias, it.rows, it.columns, it.added, it.out, it.channels, it.count,
                              step.columns, layout, bounds});
  if (!narrow.empty()) NarrowConvolution::run(narrow, threads);
  if (threads == 1 && convolutions.size() > 1) Convolution::run(convolutions);
  else
    for (const Convolution& convolution : convolutions) convolution.run(threads);
}

// A convolution 1 x 1 and a depthwise one behind it, for one image: by groups of channels, so that what lies between
// them stays near; threads share the groups.
void run_pair(const Step& first, const Given& from, const Layout& layout, const Step& second, const Given& to,
              const Layout& behind, int64_t threads) {
  const int64_t near = std::max<int64_t>(1, NEAR / layout.pixels / ROWS) * ROWS;
  const int64_t some = std::min(near, (from.count + threads - 1) / threads);
  if (!some) return;
  Threads::share(threads, (from.count + some - 1) / some, [&](int64_t i) {
    static thread_local Scratch kept;
    const int64_t begin = i * some, count = std::min(some, from.count - begin);
    float* map = kept.need(count * layout.pixels);
    Convolution{from.image, first.weight, from.bias, from.rows + begin, from.columns, nullptr, map, from.channels, count,
                first.columns, layout, {first.lowest, first.highest}}
        .run(1);
    DepthwiseConvolution{map, second.weight, to.bias, to.rows + begin, to.out + begin * behind.pixels, count, behind,
                         {second.lowest, second.highest}}
        .run(1);
  });
}

// 0, 1, 2, ... up to the rows and columns of any step.
const int64_t* every_of(const Block& block) {
  static thread_local std::vector<int64_t> every;
  int64_t most = block.aside ? std::max(block.aside->rows, block.aside->columns) : 0;
  for (const Step* s = block.step; s < block.step + block.steps; ++s) most = std::max({most, s->rows, s->columns});
  for (int64_t i = every.size(); i < most; ++i) every.push_back(i);
  return every.data();
}

// Images side by side, step by step.
void run_block(const Block& block, std::vector<Work> works, Size size, int64_t threads) {
  const int64_t* every = every_of(block);
  const int64_t total = size.behind(block).values();
  int64_t height = size.height, width = size.width;
  if (block.aside) {
    std::vector<Given> given;
    for (Work& work : works) {
      given.push_back({work.image, block.aside->bias, every, every, nullptr, work.out, block.aside->columns, block.aside->rows});
      work.shortcut = work.out;  // the branch is added to it in place
    }
    run_step(*block.aside, given, layout_of(*block.aside, height, width), threads);
  }
  std::vector<Work> all;
  for (Work& work : works)
    if (opens(block, work, height * width, total, threads)) all.push_back(std::move(work));
  if (all.empty()) return;
  static thread_local std::vector<Scratch> buffers;  // two for each image
  buffers.resize(std::max(buffers.size(), 2 * all.size()));
  std::vector<Given> before;  // what a step is given that the next one runs with it
  int64_t turn = 0;
  for (int64_t k = 0; k < block.steps; ++k) {
    const Step& step = block.step[k];
    const bool last = k + 1 == block.steps;
    const Layout layout = layout_of(step, height, width);
    const bool pairs = !last && layout.as_it_is && step.kind == CONVOLUTION && block.step[k + 1].kind == DEPTHWISE;
    std::vector<Given> given;
    for (size_t i = 0; i < all.size(); ++i) {
      Work& work = all[i];
      const int64_t count = step.open_rows ? work.open.size() : step.rows;
      const int64_t channels = step.open_columns ? work.open.size() : step.columns;
      const float* bias = step.bias;
      if (step.filled) {
        work.shifted.resize(step.rows);
        parts_of(step.rows, step.rows * block.units, threads, [&](int64_t begin, int64_t end) {
          fill(block, work, bias, step.rows, begin, end);
        });
        bias = work.shifted.data();
      }
      float* to = last ? work.out : pairs ? nullptr : buffers[2 * i + turn % 2].need(count * layout.pixels);
      given.push_back({work.image, bias, step.open_rows ? work.open.data() : every,
                       step.open_columns ? work.open.data() : every, last ? work.shortcut : nullptr, to, channels, count});
      work.image = to;
    }
    turn += !pairs;
    if (pairs) before = std::move(given);
    else if (before.empty()) run_step(step, given, layout, threads);
    else {
      const Step& former = block.step[k - 1];  // 1 x 1: its map is of the size that this step reads
      for (size_t i = 0; i < all.size(); ++i)
        run_pair(former, before[i], layout_of(former, height, width), step, given[i], layout, threads);
      before.clear();
    }
    height = layout.out_height, width = layout.out_width;
  }
}

// Whether a result may take the place of the input, which has been read by then: it is added to it, and made from what
// only the first of several convolutions reads.
bool in_place(const Block& block) { return block.adds && block.steps > 1; }

// Images side by side through blocks; of the first, the shortcut is given.
void run_blocks(const Block* blocks, int64_t count, std::vector<Work> all, Size size, int64_t threads) {
  static thread_local std::vector<Scratch> between;  // two for each image
  between.resize(std::max(between.size(), 2 * all.size()));
  int64_t moves = 0;  // results to come in places of their own
  for (int64_t b = 1; b < count; ++b) moves += !in_place(blocks[b]);
  std::vector<float*> ends;
  for (const Work& work : all) ends.push_back(work.out);
  for (int64_t b = 0; b < count; ++b) {
    const Size behind = size.behind(blocks[b]);
    if (b) moves -= !in_place(blocks[b]);
    for (size_t i = 0; i < all.size(); ++i) {
      Work& work = all[i];
      if (b) work.image = work.out;
      if (b) work.shortcut = blocks[b].adds ? work.image : nullptr;
      if (!b || !in_place(blocks[b])) work.out = moves ? between[2 * i + moves % 2].need(behind.values()) : ends[i];
    }
    run_block(blocks[b], all, size, threads);
    size = behind;
  }
}

// Whether a block's weights are so large that images should share them while they are near. What lies between blocks may
// begin with maps of which several would fill the cache.
bool is_large(const Block& block) {
  const bool branch = block.adds || block.aside;
  return branch && std::any_of(block.step, block.step + block.steps, [](const Step& s) {
    return s.kernel == 3 && s.kind == CONVOLUTION && s.rows * s.columns * 9 > FAR;
  });
}

}  // namespace

extern "C" {

// Whether weights should be packed for `NarrowConvolution` where convolutions 3 x 3 meet images of this width.
int64_t gathered_narrow(int64_t width) { return LANES == 16 && NarrowConvolution::fits(width); }

void gathered_conv(const float* images, const float* weight, const float* bias, const int64_t* rows,
                   const int64_t* columns, const float* added, float* out, int64_t batch, int64_t channels,
                   int64_t height, int64_t width, int64_t count, int64_t every, int64_t kernel, int64_t stride,
                   int64_t padding, float lowest, float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t step = channels * height * width, to = count * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    Convolution{images + i * step, weight, bias, rows, columns, added ? added + i * to : nullptr, out + i * to, channels,
                count, every, layout, {lowest, highest}}
        .run(share);
  });
}

void gathered_depthwise(const float* images, const float* weight, const float* bias, const int64_t* rows, float* out,
                        int64_t batch, int64_t count, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                        int64_t padding, float lowest, float highest, int64_t threads) {
  const Layout layout = {height, width, kernel, stride, padding};
  const int64_t step = count * height * width, to = count * layout.pixels;
  each_image(batch, threads, [&](int64_t i, int64_t share) {
    DepthwiseConvolution{images + i * step, weight, bias, rows, out + i * to, count, layout, {lowest, highest}}.run(share);
  });
}

// images (batch, features, height, width) of the first block; shortcut, or null, and out as its and the last one's
// results. Blocks with large weights and others take turns: the former run several images at once, the latter each image
// while it is in the cache.
void gathered_blocks(const Block* blocks, int64_t count, const float* images, const float* shortcut, float* out,
                     int64_t batch, int64_t height, int64_t width, int64_t threads) {
  if (!batch) return;
  static thread_local Scratch turns[2];
  Size size = {blocks->features, height, width};
  for (int64_t begin = 0, end, turn = 0; begin < count; begin = end, ++turn) {
    const bool shared = is_large(blocks[begin]);
    Size behind = size;
    for (end = begin; end < count && is_large(blocks[end]) == shared; ++end) behind = behind.behind(blocks[end]);
    const int64_t step = size.values(), to = behind.values(), added = size.behind(blocks[begin]).values();
    float* result = end < count ? turns[turn % 2].need(batch * to) : out;
    const float* adds = !begin ? shortcut : blocks[begin].adds ? images : nullptr;
    const int64_t rounds = (batch + threads * GROUP - 1) / (threads * GROUP);
    const int64_t group = shared ? (batch + threads * rounds - 1) / (threads * rounds) : 1;  // as many for each thread
    each_image((batch + group - 1) / group, threads, [&](int64_t g, int64_t share) {
      std::vector<Work> works;
      for (int64_t i = g * group; i < std::min(batch, (g + 1) * group); ++i)
        works.push_back({images + i * step, adds ? adds + i * added : nullptr, result + i * to});
      run_blocks(blocks + begin, end - begin, std::move(works), size, share);
    });
    images = result, size = behind;
  }
}

}  // extern "C"
