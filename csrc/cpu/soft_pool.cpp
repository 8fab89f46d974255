#include "soft_pool.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "exp.h"

namespace mmsoftpool::cpu {
namespace {

// A run of neighbouring outputs of one row is worked on together, tap by tap: every inner loop goes
// over the run, so it vectorises whatever the kernel, stride and dilation are.
constexpr int64_t max_run = 256;
constexpr int64_t buffer_elements =
    8192;  // what one run may take: it should stay in the L1/L2 cache

// The windows of a run: row k of `taps` holds tap k of every output.
template <typename T>
struct Run {
  explicit Run(const Geometry& g)
      : taps(g.depth.kernel * g.height.kernel * g.width.kernel),
        length(std::clamp<int64_t>(buffer_elements / taps, 16, max_run)),
        buffer(new T[(2 * taps + 3) * length]),
        shifted(buffer.get()),
        weight(shifted + taps * length),
        top(weight + taps * length),
        sum(top + length),
        mean(sum + length) {}

  int64_t taps, length;
  std::unique_ptr<T[]> buffer;
  T* shifted;  // x - max of its window, not below exp_floor
  T* weight;   // e^shifted: the softmax weight before its division by sum
  T* top;      // max of the window
  T* sum;      // sum of weight
  T* mean;     // sum of weight * shifted / sum: the output less top
};

// Where a row of outputs reads its taps: calls visit(tap, inputs, k) for the rows of the window
// that exist, with `inputs` at the row's first element and k the tap's place along the width.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_tap(const Geometry& g, int64_t od, int64_t oh, Visit&& visit) {
  int64_t tap = 0;
  for (int64_t kd = 0; kd < g.depth.kernel; ++kd) {
    const int64_t d = g.depth.first_input(od) + kd * g.depth.dilation;
    for (int64_t kh = 0; kh < g.height.kernel; ++kh) {
      const int64_t h = g.height.first_input(oh) + kh * g.height.dilation;
      if (d < 0 || d >= g.depth.in || h < 0 || h >= g.height.in) {
        continue;
      }
      for (int64_t kw = 0; kw < g.width.kernel; ++kw) {
        visit(tap++, (d * g.height.in + h) * g.width.in, kw);
      }
    }
  }
}

// Fills the run with the weights of the outputs [ow, ow + n) of row (od, oh); returns the number of
// taps that it holds. Equation 1 of the paper, with the maximum of the window taken off first.
template <typename T>
MMSOFTPOOL_INLINE int64_t load_run(
    const Geometry& g, const T* plane, int64_t od, int64_t oh, int64_t ow, int64_t n, Run<T>& run) {
  constexpr T absent = -std::numeric_limits<T>::infinity();
  // Not below the lowest number: for a window of -inf alone x - top must not be -inf + inf.
  std::fill_n(run.top, n, std::numeric_limits<T>::lowest());
  int64_t taps = 0;
  for_each_tap(g, od, oh, [&](int64_t tap, int64_t row, int64_t kw) MMSOFTPOOL_INLINE_LAMBDA {
    T* const x = run.shifted + tap * run.length;
    const int64_t begin = std::clamp<int64_t>(g.width.begin_out(kw) - ow, 0, n);
    const int64_t end = std::clamp<int64_t>(g.width.end_out(kw) - ow, begin, n);
    const T* const inputs = plane + row + g.width.first_input(ow) + kw * g.width.dilation;
    std::fill_n(x, begin, absent);
    if (g.width.stride == 1) {
      for (int64_t i = begin; i < end; ++i) {
        x[i] = inputs[i];
      }
    } else if (g.width.stride == 2) {
      for (int64_t i = begin; i < end; ++i) {
        x[i] = inputs[2 * i];
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        x[i] = inputs[g.width.stride * i];
      }
    }
    std::fill(x + end, x + n, absent);
    for (int64_t i = 0; i < n; ++i) {
      run.top[i] = x[i] > run.top[i] ? x[i] : run.top[i];  // passes over NaN, which shows up below
    }
    taps = tap + 1;
  });

  std::fill_n(run.sum, n, T(0));
  std::fill_n(run.mean, n, T(0));
  for (int64_t tap = 0; tap < taps; ++tap) {
    T* const x = run.shifted + tap * run.length;
    T* const w = run.weight + tap * run.length;
    for (int64_t i = 0; i < n; ++i) {
      // Comparisons with NaN are false: a NaN tap, or inf - inf, stays NaN through both selects.
      const T difference = x[i] - run.top[i];
      const T shifted = difference <= exp_floor<T>() ? exp_floor<T>() : difference;
      const T exponential = exp_nonpositive(shifted);
      const T weight = difference <= exp_floor<T>() ? T(0) : exponential;
      x[i] = shifted;
      w[i] = weight;
      run.sum[i] += weight;
      run.mean[i] += weight * shifted;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const T mean = run.mean[i] / run.sum[i];
    run.mean[i] = run.sum[i] == T(0) ? absent : mean;  // nothing but -inf or padding
  }
  return taps;
}

template <typename T>
MMSOFTPOOL_INLINE void forward_rows(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  Run<T> run(g);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % g.height.out;
    const int64_t od = row / g.height.out % g.depth.out;
    const T* const plane = input + row / (g.height.out * g.depth.out) * g.in_plane();
    T* const out = output + row * g.width.out;
    for (int64_t ow = 0; ow < g.width.out; ow += run.length) {
      const int64_t n = std::min(run.length, g.width.out - ow);
      load_run(g, plane, od, oh, ow, n, run);
      for (int64_t i = 0; i < n; ++i) {
        out[ow + i] = run.top[i] + run.mean[i];  // equation 2
      }
    }
  }
}

template <typename T>
MMSOFTPOOL_INLINE void backward_planes(
    const Geometry& g, Gradient gradient, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  Run<T> run(g);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* const grad_plane = grad_input + plane * g.in_plane();
    std::fill_n(grad_plane, g.in_plane(), T(0));
    for (int64_t od = 0; od < g.depth.out; ++od) {
      for (int64_t oh = 0; oh < g.height.out; ++oh) {
        const T* const grad_row =
            grad_output + ((plane * g.depth.out + od) * g.height.out + oh) * g.width.out;
        for (int64_t ow = 0; ow < g.width.out; ow += run.length) {
          const int64_t n = std::min(run.length, g.width.out - ow);
          load_run(g, input + plane * g.in_plane(), od, oh, ow, n, run);
          // From here on sum holds grad_output / sum, 0 for a window without weight, and mean
          // what comes off 1 + shifted: 1 + x - y is 1 + shifted - mean.
          for (int64_t i = 0; i < n; ++i) {
            const bool empty = run.sum[i] == T(0);
            const T scale = grad_row[ow + i] / run.sum[i];
            run.sum[i] = empty ? T(0) : scale;
            run.mean[i] = empty ? T(0) : run.mean[i];
          }
          for_each_tap(
              g, od, oh, [&](int64_t tap, int64_t row, int64_t kw) MMSOFTPOOL_INLINE_LAMBDA {
                const T* const x = run.shifted + tap * run.length;
                const T* const w = run.weight + tap * run.length;
                const int64_t first = std::clamp<int64_t>(g.width.begin_out(kw) - ow, 0, n);
                const int64_t last = std::clamp<int64_t>(g.width.end_out(kw) - ow, first, n);
                T* const grad = grad_plane + row + g.width.first_input(ow) + kw * g.width.dilation;
                // One tap of different windows is never the same element, hence the pragma.
                if (gradient == Gradient::exact) {
#pragma GCC ivdep
                  for (int64_t i = first; i < last; ++i) {
                    grad[g.width.stride * i] += run.sum[i] * w[i] * (T(1) + (x[i] - run.mean[i]));
                  }
                } else {
#pragma GCC ivdep
                  for (int64_t i = first; i < last; ++i) {
                    grad[g.width.stride * i] += run.sum[i] * w[i];
                  }
                }
              });
        }
      }
    }
  }
}

// One library for every x86-64: the loops above are compiled once per instruction set, and the
// widest that the machine has is taken at run time. Elsewhere the base has its vectors already.
#if defined(__x86_64__)
#define MMSOFTPOOL_COMPILE_FOR(NAME, TARGET)                                                     \
  namespace NAME {                                                                               \
  template <typename T>                                                                          \
  __attribute__((target(TARGET))) void forward(                                                  \
      const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {                \
    forward_rows(g, input, output, begin, end);                                                  \
  }                                                                                              \
  template <typename T>                                                                          \
  __attribute__((target(TARGET))) void backward(                                                 \
      const Geometry& g, Gradient gradient, const T* grad_output, const T* input, T* grad_input, \
      int64_t begin, int64_t end) {                                                              \
    backward_planes(g, gradient, grad_output, input, grad_input, begin, end);                    \
  }                                                                                              \
  }
MMSOFTPOOL_COMPILE_FOR(avx2, "avx2,fma")
MMSOFTPOOL_COMPILE_FOR(avx512, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#undef MMSOFTPOOL_COMPILE_FOR

const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#endif

}  // namespace

template <typename T>
void soft_pool_forward(
    const Geometry& geometry, const T* input, T* output, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (has_avx512) {
    return avx512::forward(geometry, input, output, begin, end);
  }
  if (has_avx2) {
    return avx2::forward(geometry, input, output, begin, end);
  }
#endif
  forward_rows(geometry, input, output, begin, end);
}

template <typename T>
void soft_pool_backward(
    const Geometry& geometry, Gradient gradient, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (has_avx512) {
    return avx512::backward(geometry, gradient, grad_output, input, grad_input, begin, end);
  }
  if (has_avx2) {
    return avx2::backward(geometry, gradient, grad_output, input, grad_input, begin, end);
  }
#endif
  backward_planes(geometry, gradient, grad_output, input, grad_input, begin, end);
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                      \
  template void soft_pool_forward<T>(const Geometry&, const T*, T*, int64_t, int64_t); \
  template void soft_pool_backward<T>(                                                 \
      const Geometry&, Gradient, const T*, const T*, T*, int64_t, int64_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cpu
