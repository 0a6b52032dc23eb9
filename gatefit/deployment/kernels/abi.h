#pragma once

// The contract between Python and the compiled kernels: constants, structs, exported functions.
//
// abi.py mirrors the constants and structs under the same names. native.py compares both sides when it loads the
// library, and refuses one that differs. Raise ABI_VERSION when a meaning changes but no size does: the arguments of a
// function, the order of packed weights, what a field says.
//
// Shapes are given by letter. Tensors are float32, indices int64, all without gaps and with the last axis innermost.
//
//   B              images of a batch
//   C              channels of a block's input
//   H, W           height and width of the images that a kernel reads
//   OH, OW         of those that it writes: OH = (H + 2 * padding - K) / stride + 1, rounded down; OW likewise
//   KH, KW         height and width of a kernel; both are K, as kernels, strides and paddings are square
//   OC, IC         all output and all input channels of a weight
//   n_out, n_in    how many of these are open: output channels that are computed, input channels that are read
//   oc, ic         which ones: indices (n_out,) into OC and (n_in,) into IC
//   U              gated units of a block
//   P              PACKED_OC
//
// Images hold open channels only: channel j of an image (n_in, H, W) is input channel ic[j] of the weight.
// clamp(x) is the activation, see `Activation`. Pixels beyond the border are 0, in max pooling -infinity. A bias or
// residual that is null is 0.

#include <cstdint>

constexpr int64_t ABI_VERSION = 2;

// P: neighbouring output channels that lie side by side in a packed weight, one in each lane of a register.
constexpr int64_t PACKED_OC = 16;

// An activation. p is its `parameter`, sigmoid(x) = 1 / (1 + exp(-x)).
//
//   CLAMP       min(max(x, lowest), highest): 0 and infinity are a ReLU, 0 and 6 a ReLU6, -infinity and infinity none
//   SILU        x * sigmoid(x)
//   HARDSWISH   x * min(max(x + 3, 0), 6) / 6
//   GELU        x * (1 + erf(x / sqrt(2))) / 2
//   GELU_TANH   x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)), the same with tanh for erf
//   LEAKY_RELU  x where x > 0, else p * x
//   ELU         x where x > 0, else p * (exp(x) - 1)
enum Activation : int64_t { CLAMP = 0, SILU = 1, HARDSWISH = 2, GELU = 3, GELU_TANH = 4, LEAKY_RELU = 5, ELU = 6 };

// What a step of a branch computes.
//
//   CONVOLUTION  out[i, y, x] = clamp(bias[oc[i]] + residual[i, y, x] + sum over j, kh, kw of
//                    weight[oc[i], ic[j], kh, kw] * in[j, y * stride - padding + kh, x * stride - padding + kw])
//                for in (n_in, H, W), weight (OC, IC, KH, KW), bias (OC,), residual and out (n_out, OH, OW)
//   DEPTHWISE    out[i, y, x] = clamp(bias[oc[i]] + sum over kh, kw of
//                    weight[oc[i], 0, kh, kw] * in[i, y * stride - padding + kh, x * stride - padding + kw])
//                for in (n_out, H, W), weight (OC, 1, KH, KW), bias (OC,), out (n_out, OH, OW)
//   MAX_POOLING  out[i, y, x] = max over kh, kw of in[i, y * stride - padding + kh, x * stride - padding + kw]
//                for in (OC, H, W), out (OC, OH, OW); NaN is larger than anything
enum StepKind : int64_t { CONVOLUTION = 0, DEPTHWISE = 1, MAX_POOLING = 2 };

// One layer of a branch. Where oc or ic are the open units, n_out or n_in is their number; else it is OC or IC.
struct StepStruct {
  // (OC, IC, KH, KW); null for MAX_POOLING.
  const float* weight;
  // (OC,), or null.
  const float* bias;
  // The weight packed as (IC, OC / P, KH * KW, P), or null where `gathered_narrow` does not ask for it:
  //     packed_weight[ic][oc / P][kh * KW + kw][oc % P] = weight[oc][ic][kh][kw]
  // For a CONVOLUTION with K = 3, stride = padding = 1 and OC a multiple of P. Example: OC = 32, IC = 2, P = 16. The
  // centre tap (kh = kw = 1, tap 4) of weight[17][1], which is lane 1 of the second group of outputs, stands at
  // packed_weight[((1 * 2 + 1) * 9 + 4) * 16 + 1].
  const float* packed_weight;
  // OC and IC. IC is 1 for DEPTHWISE, and OC for MAX_POOLING.
  int64_t oc_total, ic_total;
  // K, stride and padding, the same down and across.
  int64_t kernel, stride, padding;
  // A `StepKind`.
  int64_t kind;
  // 1: oc are the open units of the block; 0: all. Likewise ic.
  int64_t open_oc, open_ic;
  // 1: the bias is the one that stands in for closed units, see `BlockStruct`.
  int64_t compensated;
  // The activation and what it reads. The last step's is applied behind the sum with the residual.
  int64_t activation;
  float parameter, lowest, highest;
};

// A block and its gates. For one image x (C, H, W):
//
//   logits = gate_bias + gate_weight @ mean of x over H and W, (has_block + U,)
//   The block gate logits[0], if has_block, must be above 0, or the image skips the branch: out = clamp(residual).
//   Unit u is open if its logit z[u] = logits[has_block + u] is above 0.
//   A compensated step gets the bias
//       bias[c] + sum over closed u of max(z[u] + threshold[u], 0) / 8 * compensation[u, c]
//   residual = projection(x) if there is a projection; x if adds_input; else none.
//   out = the steps one behind the other, from x on; the last one adds the residual and must be a CONVOLUTION to do so.
struct BlockStruct {
  // (has_block + U, C), or null: the block always runs, and no step has open_oc, open_ic or compensated.
  const float* gate_weight;
  // (has_block + U,).
  const float* gate_bias;
  // (U, OC) for the OC of each compensated step, or null. Then `threshold` is not read either.
  const float* compensation;
  // (U,): by how much each logit has been lowered since training began.
  const float* threshold;
  // C, which are the gates' features too.
  int64_t channels;
  // 1: the first logit is the block gate's.
  int64_t has_block;
  // U.
  int64_t n_units;
  int64_t n_steps;
  // 1: the branch is added to the block's input; for the first block of a call, to the residual that the call is given.
  int64_t adds_input;
  // (n_steps,).
  const StepStruct* steps;
  // One CONVOLUTION that makes the residual of the block's input, or null.
  const StepStruct* projection;
  // The activation behind the sum, for images that skip the branch.
  int64_t activation;
  float parameter, lowest, highest;
};

extern "C" {

// ABI_VERSION.
int64_t gathered_abi_version();

// A line "name value" for each constant, "struct size" for each struct, and "struct.field offset size" for each field,
// in bytes.
const char* gathered_abi_layout();

// 1 if weights should be packed (see `StepStruct::packed_weight`) for convolutions of images that are W = `width` wide.
int64_t gathered_narrow(int64_t width);

// out = clamp(bias + residual + convolution), see CONVOLUTION, with the activation CLAMP, for each of B images.
//   images (B, n_in, H, W)   weight (OC, IC, K, K)   bias (OC,) or null   oc (n_out,)   ic (n_in,), ascending
//   residual (B, n_out, OH, OW) or null   out (B, n_out, OH, OW)
void gathered_conv(const float* images, const float* weight, const float* bias, const int64_t* oc, const int64_t* ic,
                   const float* residual, float* out, int64_t batch, int64_t n_in, int64_t height, int64_t width,
                   int64_t n_out, int64_t ic_total, int64_t kernel, int64_t stride, int64_t padding, float lowest,
                   float highest, int64_t threads);

// out = clamp(bias + depthwise convolution), see DEPTHWISE, with the activation CLAMP, for each of B images.
//   images (B, n_out, H, W)   weight (OC, 1, K, K)   bias (OC,) or null   oc (n_out,)   out (B, n_out, OH, OW)
void gathered_depthwise(const float* images, const float* weight, const float* bias, const int64_t* oc, float* out,
                        int64_t batch, int64_t n_out, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                        int64_t padding, float lowest, float highest, int64_t threads);

// Run each of B images through blocks, see `BlockStruct`; each block reads what the one before gives.
//   images (B, C of the first block, H, W)   out (B, OC of the last step, its OH, its OW)
//   residual: what the first block adds to its branch, of the shape of its result, if it has adds_input; else null
void gathered_blocks(const BlockStruct* blocks, int64_t n_blocks, const float* images, const float* residual,
                     float* out, int64_t batch, int64_t height, int64_t width, int64_t threads);

}  // extern "C"
