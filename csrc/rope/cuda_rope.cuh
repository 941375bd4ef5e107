// A warp per head of a token, in shared memory: its norm if there is one, then the rotation, each product and sum rounded to the dtype.
// The backward of the norms goes through a fixed share of 128 heads per block, so that weight gradients come out the same in every run.
#pragma once

#include "rms_norm/cuda_norm.cuh"
#include "rope/params.h"

namespace llada::cuda {

constexpr int kRopeWarps = 8;

// Dim i of a turned head; `value(j)` is dim j before. The minus sign commutes with rounding.
template <class T, bool kTransposed, class F>
__device__ __forceinline__ float turned(const RopeParams& p, const T* cos, const T* sin, int i, F&& value) {
  const int half = int(p.rotary / 2);
  if (i >= p.rotary) return value(i);
  const bool first = i < half;
  const int other = first ? i + half : i - half;
  const float straight = round_to<T>(value(i) * to_float(cos[i]));
  const float crossed = round_to<T>(value(other) * to_float(sin[kTransposed ? other : i]));
  return round_to<T>(first != kTransposed ? straight - crossed : straight + crossed);
}

enum class Turn { forward, backward, backward_of_norm };

// A warp turns head `row` of h, counted over the tokens. head: p.dim floats of shared memory, behind which a backward of the norm has as
// many again. add(dim, dw) takes the weight gradients.
template <class T, Turn kTurn, class F>
__device__ __forceinline__ void turn_head(const RopeParams& p, const RopeHeads& h, int64_t row, float* head, int lane, F&& add) {
  constexpr bool kTransposed = kTurn != Turn::forward;
  const int64_t token = unsigned(row) / unsigned(h.heads), which = row - token * h.heads;
  const int dim = int(p.dim);
  const T* x = static_cast<const T*>(h.x) + token * h.stride + which * dim;
  const T *cos = static_cast<const T*>(p.cos) + token * p.rotary, *sin = static_cast<const T*>(p.sin) + token * p.rotary;
  const T* weight = static_cast<const T*>(h.weight);
  T* y = static_cast<T*>(h.y) + row * dim;
  const auto each = [&](auto&& f) {  // f(i, Count<k>): this lane's dims, as in rms_norm
    each_pack<T>(dim, lane, kWarp, f);
  };
  float squares = 0.f;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  each([&](int64_t i, auto count) {
    constexpr int k = decltype(count)::value;
    const Pack<T, k> a = load_some<k>(x + i, aligned);
#pragma unroll
    for (int j = 0; j < k; ++j) {
      head[i + j] = to_float(a.at[j]);
      squares += head[i + j] * head[i + j];
    }
  });
  if (weight != nullptr && !kTransposed) {
    const float rstd = norm_factor(warp_sum(squares), dim, p.eps);
    each([&](int64_t i, auto count) {
      for (int j = 0; j < decltype(count)::value; ++j) head[i + j] = to_float(norm_element<T>(head[i + j], rstd, to_float(weight[i + j])));
    });
    if (lane == 0) h.rstd[row] = rstd;
  }
  __syncwarp();
  const auto value = [&](int d) { return head[d]; };
  const auto store_each = [&](auto&& f) {
    const bool out_aligned = reinterpret_cast<uintptr_t>(y) % 16 == 0;
    each([&](int64_t i, auto count) {
      Pack<T, decltype(count)::value> out;
#pragma unroll
      for (int j = 0; j < decltype(count)::value; ++j) out.at[j] = from_float<T>(f(int(i) + j));
      store_some(y + i, out, out_aligned);
    });
  };
  if constexpr (kTurn != Turn::backward_of_norm) {
    store_each([&](int d) { return turned<T, kTransposed>(p, cos, sin, d, value); });
  } else {
    const T* input = static_cast<const T*>(h.input) + token * h.input_stride + which * dim;
    const float rstd = h.rstd[row];
    float* grad = head + dim;
    const auto gradient = [&](int d) { return NormGradient<T>(grad[d], to_float(input[d]), to_float(weight[d]), rstd); };
    float dot = 0.f;
    each([&](int64_t i, auto count) {
      for (int j = 0; j < decltype(count)::value; ++j) {
        grad[i + j] = turned<T, kTransposed>(p, cos, sin, int(i) + j, value);
        const NormGradient<T> g = gradient(int(i) + j);
        dot += g.dz * g.z;
      }
    });
    const float mean = row_mean(warp_sum(dot), dim);
    store_each([&](int d) {
      const NormGradient<T> g = gradient(d);
      add(d, g.dw);
      return g.dx(mean, rstd);
    });
  }
  __syncwarp();
}

// Queries first, then keys. Dynamic shared memory: p.dim floats per warp.
template <class T, Turn kTurn>
__global__ void __launch_bounds__(kRopeWarps* kWarp) turn_heads(RopeParams p) {
  const int64_t i = int64_t(blockIdx.x) * kRopeWarps + threadIdx.x / kWarp, q_rows = p.q.tokens * p.q.heads;
  if (i >= q_rows + p.k.tokens * p.k.heads) return;
  float* head = dynamic_shared<float>() + threadIdx.x / kWarp * p.dim;
  turn_head<T, kTurn>(p, i < q_rows ? p.q : p.k, i < q_rows ? i : i - q_rows, head, threadIdx.x % kWarp, [](int, float) {});
}

// A block per chunk of kNormChunk heads, of the queries first. Dynamic shared memory: 2 * p.dim floats per warp, and p.dim sums.
template <class T>
__global__ void __launch_bounds__(kRopeWarps* kWarp) turn_heads_backward(RopeParams p, float* partial) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, dim = int(p.dim);
  float *head = dynamic_shared<float>() + warp * 2 * dim, *sums = dynamic_shared<float>() + 2 * kRopeWarps * dim;
  for (int d = threadIdx.x; d < kRopeWarps * dim; d += blockDim.x) sums[d] = 0.f;
  __syncthreads();
  const int64_t q_chunks = (p.q.tokens * p.q.heads + kNormChunk - 1) / kNormChunk;
  const bool queries = blockIdx.x < q_chunks;
  const RopeHeads& h = queries ? p.q : p.k;
  const int64_t rows = h.tokens * h.heads, begin = (queries ? blockIdx.x : blockIdx.x - q_chunks) * kNormChunk;
  const int64_t end = begin + kNormChunk < rows ? begin + kNormChunk : rows;
  for (int64_t i = begin + warp; i < end; i += kRopeWarps)
    turn_head<T, Turn::backward_of_norm>(p, h, i, head, lane, [&](int d, float dw) { sums[warp * dim + d] += dw; });
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < kRopeWarps; ++w) sum += sums[w * dim + d];
    partial[int64_t(blockIdx.x) * dim + d] = sum;
  }
}

template <class T>
int launch_rope(const RopeParams& p, void* workspace, void* stream) {
  const int64_t q_rows = p.q.tokens * p.q.heads, k_rows = p.k.tokens * p.k.heads;
  const size_t bytes = size_t(kRopeWarps * p.dim) * sizeof(float);
  const int64_t blocks = divide_up(q_rows + k_rows, kRopeWarps);
  if (!p.transposed) return launch(turn_heads<T, Turn::forward>, blocks, kRopeWarps * kWarp, bytes, stream, p);
  if (p.q.weight == nullptr) return launch(turn_heads<T, Turn::backward>, blocks, kRopeWarps * kWarp, bytes, stream, p);
  const int64_t q_chunks = divide_up(q_rows, kNormChunk), k_chunks = divide_up(k_rows, kNormChunk), columns = divide_up(p.dim, 256);
  float* partial = static_cast<float*>(workspace);
  int error = launch(turn_heads_backward<T>, q_chunks + k_chunks, kRopeWarps * kWarp, 3 * bytes, stream, p, partial);
  if (error == 0) error = launch(sum_norm_chunks<float>, columns, 256, 0, stream, partial, q_chunks, p.dim, p.q.grad_weight);
  if (error == 0 && p.k.weight != nullptr)
    error = launch(sum_norm_chunks<float>, columns, 256, 0, stream, partial + q_chunks * p.dim, k_chunks, p.dim, p.k.grad_weight);
  return error;
}

}  // namespace llada::cuda
