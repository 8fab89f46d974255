// Contiguous tensors: a vector holds neighbouring windows of a row.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "softmax.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  for (int64_t row = begin; row < end; ++row) {
    const auto& taps = split.taps(input, row / height / depth, row / height % depth, row % height);
    T* const output_row = output + row * width;
    with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
      const auto* const* const tap = taps.data();
      int64_t ow = 0;
      const auto pool = [&](auto&& store) MMSOFTPOOL_INLINE_LAMBDA {
        window_outputs<constant.value, S>(
            OneVector(), taps.size(), exponents,
            [&](int64_t t, int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + ow); },
            store);
      };
      for (; ow + S::lanes <= width; ow += S::lanes) {
        pool([&](int64_t, Vec y) MMSOFTPOOL_INLINE_LAMBDA { S::store(y, output_row + ow); });
      }
      if (ow < width) {
        pool([&](int64_t, Vec y)
                 MMSOFTPOOL_INLINE_LAMBDA { S::store_first(y, output_row + ow, width - ow); });
      }
    });
  }
}

// Items are planes.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  GradientRows<A> gradient_rows(pooling, layout.size);
  Pointers<A> grads;  // as the taps, in gradient_rows
  grads.reserve(pooling.taps());
  std::vector<A> scratch(pooling.taps() * S::lanes);
  const int64_t width = pooling.width.out;

  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const grad_plane = grad_output + plane * pooling.out_plane();
    T* const grad_input_plane = grad_input + plane * pooling.in_plane();
    const auto add_row = [&](int64_t od, int64_t oh) MMSOFTPOOL_INLINE_LAMBDA {
      const auto& taps = split.taps(input, plane, od, oh);
      grads.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
        A* const row = gradient_rows.claim(plane, d, h);
        for (const int64_t offset : split.offsets()) {
          grads.push_back(row + offset);
        }
      });
      const T* const grad_row = grad_plane + (od * pooling.height.out + oh) * width;
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        const A* const* const tap = taps.data();
        A* const* const grad = grads.data();
        int64_t ow = 0;
        const auto add_gradients = [&](Vec grad_output, auto&& add) MMSOFTPOOL_INLINE_LAMBDA {
          window_gradients<constant.value, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) MMSOFTPOOL_INLINE_LAMBDA { return grad_output; }, scratch.data(),
              [&](int64_t t, int64_t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + ow); },
              add);
        };
        for (; ow + S::lanes <= width; ow += S::lanes) {
          add_gradients(
              S::load(grad_row + ow), [&](int64_t t, int64_t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                S::store(S::load(grad[t] + ow) + v, grad[t] + ow);
              });
        }
        if (const int64_t rest = width - ow; rest > 0) {
          // The lanes beyond may hold columns of real windows, or a NaN.
          const auto live = S::first_lanes(rest);
          add_gradients(
              S::load_first(grad_row + ow, rest),
              [&](int64_t t, int64_t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                S::store(S::load(grad[t] + ow) + S::masked(v, live), grad[t] + ow);
              });
        }
      });
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) MMSOFTPOOL_INLINE_LAMBDA {
      T* const row = grad_input_plane + (d * pooling.height.in + h) * pooling.width.in;
      if (sums != nullptr) {
        merge_row<S>(layout, sums, row);
      } else {
        std::fill_n(row, pooling.width.in, T{});
      }
    };
    gradient_rows.for_each_output_row(plane, add_row, write_row);
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(contiguous)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, float)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, double)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, Half)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, BFloat16)

}  // namespace mmsoftpool::cpu
