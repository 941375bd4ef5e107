// A block per row, forward and backward; the second reading of the row comes from the cache. The gradient of the weight is summed by
// columns: a block per chunk of rows and 32 columns, then over the chunks.
#pragma once

#include "rms_norm/cuda_norm.cuh"
#include "rms_norm/params.h"

namespace llada::cuda {

constexpr int kNormColumns = 32, kNormColumnWarps = 8;

template <class T>
__global__ void __launch_bounds__(512) norm_rows(RmsNormParams p, bool aligned) {
  struct Shared {
    float partial[kWarp];
  };
  const int64_t n = p.width, row = blockIdx.x;
  const T *x = static_cast<const T*>(p.x) + row * n, *weight = static_cast<const T*>(p.weight);
  const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * n;
  T *y = static_cast<T*>(p.y) + row * n, *total = static_cast<T*>(p.total) + (residual == nullptr ? 0 : row * n);
  float squares = 0.f;
  each_pack<T>(n, threadIdx.x, blockDim.x, [&](int64_t i, auto count) {
    constexpr int k = decltype(count)::value;
    Pack<T, k> a = load_some<k>(x + i, aligned);
    if (residual != nullptr) {
      const Pack<T, k> b = load_some<k>(residual + i, aligned);
#pragma unroll
      for (int j = 0; j < k; ++j) a.at[j] = from_float<T>(to_float(a.at[j]) + to_float(b.at[j]));
      store_some(total + i, a, aligned);
    }
#pragma unroll
    for (int j = 0; j < k; ++j) squares += to_float(a.at[j]) * to_float(a.at[j]);
  });
  const float rstd = norm_factor(block_sum(squares, shared<Shared>().partial), n, p.eps);
  if (threadIdx.x == 0) p.rstd[row] = rstd;
  const T* normed = residual == nullptr ? x : total;  // each thread reads what it wrote itself, from the cache
  each_pack<T>(n, threadIdx.x, blockDim.x, [&](int64_t i, auto count) {
    constexpr int k = decltype(count)::value;
    Pack<T, k> a = load_some<k>(normed + i, aligned);
    const Pack<T, k> w = load_some<k>(weight + i, aligned);
#pragma unroll
    for (int j = 0; j < k; ++j) a.at[j] = norm_element<T>(to_float(a.at[j]), rstd, to_float(w.at[j]));
    store_some(y + i, a, aligned);
  });
}

template <class T>
__global__ void __launch_bounds__(512) norm_rows_backward(RmsNormBackwardParams p, bool aligned) {
  struct Shared {
    float partial[kWarp];
  };
  const int64_t n = p.width, row = blockIdx.x;
  const T *x = static_cast<const T*>(p.x) + row * n, *dy = static_cast<const T*>(p.grad_y) + row * n;
  const T* weight = static_cast<const T*>(p.weight);
  const T* more = p.grad_total == nullptr ? nullptr : static_cast<const T*>(p.grad_total) + row * n;
  T* dx = static_cast<T*>(p.grad_x) + row * n;
  const float rstd = p.rstd[row];
  // f(i, j, gradient) for each number i + j of a pack.
  const auto each_gradient = [&](auto&& f, auto&& done) {
    each_pack<T>(n, threadIdx.x, blockDim.x, [&](int64_t i, auto count) {
      constexpr int k = decltype(count)::value;
      const Pack<T, k> g = load_some<k>(dy + i, aligned), a = load_some<k>(x + i, aligned), w = load_some<k>(weight + i, aligned);
      Pack<T, k> out;
#pragma unroll
      for (int j = 0; j < k; ++j) out.at[j] = f(i + j, NormGradient<T>(to_float(g.at[j]), to_float(a.at[j]), to_float(w.at[j]), rstd));
      done(i, out);
    });
  };
  float dot = 0.f;
  each_gradient(
      [&](int64_t, const NormGradient<T>& d) {
        dot += d.dz * d.z;
        return T{};
      },
      [](int64_t, const auto&) {});
  const float mean = row_mean(block_sum(dot, shared<Shared>().partial), n);
  each_gradient(
      [&](int64_t i, const NormGradient<T>& d) {
        const T own = from_float<T>(d.dx(mean, rstd));
        return more == nullptr ? own : from_float<T>(to_float(own) + to_float(more[i]));
      },
      [&](int64_t i, const auto& out) { store_some(dx + i, out, aligned); });
}

// partial[chunk][column]: a block takes 32 columns of a chunk of rows, warp w the rows w, w + 8, ...; the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kNormColumns* kNormColumnWarps) weight_gradients(RmsNormBackwardParams p, float* partial) {
  struct Shared {
    float sums[kNormColumnWarps][kNormColumns];
  };
  Shared& s = shared<Shared>();
  const int64_t groups = (p.width + kNormColumns - 1) / kNormColumns;
  const int64_t chunk = blockIdx.x / groups, column = blockIdx.x % groups * kNormColumns + threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t end = (chunk + 1) * kNormChunk < p.rows ? (chunk + 1) * kNormChunk : p.rows;
  float sum = 0.f;
  for (int64_t row = chunk * kNormChunk + warp; row < end && column < p.width; row += kNormColumnWarps) {
    const int64_t i = row * p.width + column;
    sum += NormGradient<T>(to_float(static_cast<const T*>(p.grad_y)[i]), to_float(static_cast<const T*>(p.x)[i]), 0.f, p.rstd[row]).dw;
  }
  s.sums[warp][threadIdx.x % kWarp] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  for (int w = 1; w < kNormColumnWarps; ++w) sum += s.sums[w][threadIdx.x];
  partial[chunk * p.width + column] = sum;
}

template <class T, class... Pointers>
bool all_aligned(int64_t width, const Pointers*... pointers) {
  return width % int64_t(16 / sizeof(T)) == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
int launch_rms_norm(const RmsNormParams& p, void* stream) {
  const bool aligned = all_aligned<T>(p.width, p.x, p.weight, p.residual, p.y, p.total);
  return launch(norm_rows<T>, p.rows, norm_threads(p.width, 16 / sizeof(T)), 0, stream, p, aligned);
}

template <class T>
int launch_rms_norm_backward(const RmsNormBackwardParams& p, void* workspace, void* stream) {
  const bool aligned = all_aligned<T>(p.width, p.x, p.weight, p.grad_y, p.grad_x);
  int error = launch(norm_rows_backward<T>, p.rows, norm_threads(p.width, 16 / sizeof(T)), 0, stream, p, aligned);
  const int64_t chunks = divide_up(p.rows, kNormChunk);
  float* partial = static_cast<float*>(workspace);
  if (error == 0)
    error = launch(weight_gradients<T>, chunks * divide_up(p.width, kNormColumns), kNormColumns * kNormColumnWarps, 0, stream, p, partial);
  if (error == 0) error = launch(sum_norm_chunks<float>, divide_up(p.width, 256), 256, 0, stream, partial, chunks, p.width, p.grad_weight);
  return error;
}

}  // namespace llada::cuda
