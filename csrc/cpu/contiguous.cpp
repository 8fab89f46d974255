// Contiguous tensors: a vector holds neighbouring windows of a row.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "softmax.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  for (int64_t row = begin; row < end; ++row) {
    const auto& taps = split.taps(input, row / height / depth, row / height % depth, row % height);
    T* const output_row = output + row * width;
    with_taps(taps.size(), [&](auto constant) INLINED {
      const auto* const* const tap = taps.data();
      for (int64_t ow = 0; ow < width; ow += S::lanes) {
        window_outputs<constant.value, S>(
            OneVector(), taps.size(), exponents,
            [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + ow); },
            [&](int64_t, auto y)
                INLINED { S::store(y, output_row + ow, std::min(S::lanes, width - ow)); });
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
    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      const auto& taps = split.taps(input, plane, od, oh);
      grads.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
        A* const row = gradient_rows.claim(plane, d, h);
        for (const int64_t offset : split.offsets()) {
          grads.push_back(row + offset);
        }
      });
      const T* const grad_row = grad_plane + (od * pooling.height.out + oh) * width;
      with_taps(taps.size(), [&](auto constant) INLINED {
        const A* const* const tap = taps.data();
        A* const* const grad = grads.data();
        const auto add_gradients = [&](int64_t ow, auto n) INLINED {
          const auto live = S::first_lanes(n);
          window_gradients<constant.value, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) INLINED { return S::load(grad_row + ow, n); }, scratch.data(),
              [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + ow); },
              [&](int64_t t, int64_t, Vec v) INLINED {
                // The lanes beyond may hold columns of real windows, or a NaN.
                constexpr bool all = std::is_same_v<decltype(n), typename S::All>;
                S::store(S::load(grad[t] + ow) + (all ? v : S::masked(v, live)), grad[t] + ow);
              });
        };
        int64_t ow = 0;
        for (; ow + S::lanes <= width; ow += S::lanes) {
          add_gradients(ow, typename S::All());
        }
        if (ow < width) {
          add_gradients(ow, width - ow);
        }
      });
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) INLINED {
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
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, double)

}  // namespace mmsoftpool::cpu
