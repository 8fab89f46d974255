// Contiguous tensors with few, large windows in a row, such as one over the whole map: a vector
// holds taps of one window.
#include <algorithm>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "rows.h"
#include "softmax.h"

namespace mmsoftpool::cpu {
namespace {

// Whether a window is all of a plane: its taps lie in memory one after the other.
bool is_whole_plane(const Pooling& pooling) {
  const auto is_whole = [](const Axis& axis) {
    return axis.out == 1 && axis.padding == 0 && axis.dilation == 1 && axis.kernel_size == axis.in;
  };
  return is_whole(pooling.depth) && is_whole(pooling.height) && is_whole(pooling.width);
}

// The taps of one window, in vectors: `size` numbers at `from`.
template <typename S, typename T>
class WindowTaps {
 public:
  using Vec = typename S::Vec;

  MMSOFTPOOL_INLINE WindowTaps(const T* from, int64_t size) : from_(from), size_(size) {}

  // Calls visit(tap number of the first lane, repeated, taps). Lanes without a tap hold -inf. The
  // last vector ends with the last tap: its first lanes, `repeated` of them, belong to taps of the
  // vector before it, and hold -inf too.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_vector(Visit&& visit) const {
    const Vec absent = S::splat(-std::numeric_limits<typename S::Scalar>::infinity());
    int64_t t = 0;
    for (; t + S::lanes <= size_; t += S::lanes) {
      visit(t, int64_t(0), S::load(from_ + t));
    }
    if (t == size_) {
      return;
    }
    using A = typename S::Scalar;
    if (size_ >= S::lanes) {
      const int64_t repeated = S::lanes - (size_ - t);
      const Vec x = S::load(from_ + t - repeated);
      visit(t - repeated, repeated, S::lane_numbers() < S::broadcast(A(repeated)) ? absent : x);
    } else {
      const Vec x = S::load_first(from_, size_);
      visit(t, int64_t(0), S::lane_numbers() < S::broadcast(A(size_)) ? x : absent);
    }
  }

  MMSOFTPOOL_INLINE Vec max() const {
    Vec max = S::splat(-std::numeric_limits<typename S::Scalar>::infinity());
    for_each_vector([&](int64_t, int64_t, Vec x) INLINED { max = x > max ? x : max; });
    return S::broadcast(S::reduce(max, [](auto a, auto b) INLINED { return a > b ? a : b; }));
  }

 private:
  const T* from_;
  int64_t size_;
};

// The taps between two carries of their sums.
template <typename S>
constexpr int64_t block = Softmax<S>::tap_block * S::lanes;

// Calls visit(first tap, their number) for the runs of neighbouring taps of window ow of row
// (od, oh) in a plane.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_run(
    const Pooling& pooling, int64_t od, int64_t oh, int64_t ow, Visit&& visit) {
  const Axis& width = pooling.width;
  const int64_t begin = width.first_input(ow), first = std::max<int64_t>(begin, 0);
  const int64_t number = std::min(begin + width.taps(ow), width.in) - first;
  for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
    const int64_t row = (d * pooling.height.in + h) * width.in;
    if (width.dilation == 1) {
      visit(row + first, number);
    } else {
      for_each_column(width, ow, [&](int64_t w) INLINED { visit(row + w, int64_t(1)); });
    }
  });
}

// Copies the taps of a window and returns their number.
template <typename T>
MMSOFTPOOL_INLINE int64_t
copy_taps(const Pooling& pooling, const T* plane, int64_t od, int64_t oh, int64_t ow, T* to) {
  int64_t size = 0;
  for_each_run(pooling, od, oh, ow, [&](int64_t first, int64_t number) INLINED {
    std::copy_n(plane + first, number, to + size);
    size += number;
  });
  return size;
}

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const bool whole = is_whole_plane(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  std::vector<T> window(whole ? 0 : pooling.taps());
  for (int64_t row = begin; row < end; ++row) {
    const T* const plane = input + row / height / depth * pooling.in_plane();
    for (int64_t ow = 0; ow < width; ++ow) {
      const int64_t size =
          whole ? pooling.taps()
                : copy_taps(pooling, plane, row / height % depth, row % height, ow, window.data());
      const WindowTaps<S, T> taps(whole ? plane : window.data(), size);
      Softmax<S> softmax(exponents, taps.max());
      taps.for_each_vector([&](int64_t t, int64_t, auto x) INLINED {
        softmax.carry_before(t, block<S>);
        softmax.add(x);
      });
      softmax.complete(size, block<S>);
      softmax.merge_lanes();
      S::store_first(softmax.output(), output + row * width + ow, 1);
    }
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
  const bool whole = is_whole_plane(pooling);
  const int64_t in_plane = pooling.in_plane();
  std::vector<T> window(whole ? 0 : pooling.taps());
  std::vector<A> weights(pooling.taps() + S::lanes), gradients(whole ? 0 : pooling.taps());
  constexpr bool in_place = std::is_same_v<T, A>;
  std::vector<A> converted(in_place ? 0 : in_plane);
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const x = input + plane * in_plane;
    T* const grad_x = grad_input + plane * in_plane;
    const T* grad_y = grad_output + plane * pooling.out_plane();

    const auto store_gradients = [&](const T* from, int64_t size, A* to) INLINED {
      const WindowTaps<S, T> taps(from, size);
      Softmax<S> softmax(exponents, taps.max());
      A* weight = weights.data();
      taps.for_each_vector([&](int64_t t, int64_t, Vec tap) INLINED {
        softmax.carry_before(t, block<S>);
        S::store(softmax.add(tap), weight);
        weight += S::lanes;
      });
      softmax.complete(size, block<S>);
      softmax.merge_lanes();
      const Vec scale = softmax.scale(S::broadcast(S::load_first(grad_y++, 1)[0]));
      const Vec offset = softmax.offset();
      weight = weights.data();
      taps.for_each_vector([&](int64_t t, int64_t repeated, Vec tap) INLINED {
        Vec v = scale * S::load(weight);
        weight += S::lanes;
        if (pooling.gradient == Gradient::exact) {
          v *= softmax.slope(tap, offset);
        }
        if (repeated > 0) {
          v = S::lane_numbers() < S::broadcast(A(repeated)) ? S::load(to + t) : v;
        }
        S::store(v, to + t);
      });
    };
    A* sums = converted.data();
    if constexpr (in_place) {
      sums = grad_x;
    }
    if (whole) {
      store_gradients(x, in_plane, sums);
    } else {
      std::fill_n(sums, in_plane, A(0));
    }
    for (int64_t window_number = 0; !whole && window_number < pooling.out_plane();
         ++window_number) {
      const int64_t row = window_number / pooling.width.out;
      const int64_t od = row / pooling.height.out, oh = row % pooling.height.out;
      const int64_t ow = window_number % pooling.width.out;
      store_gradients(
          window.data(), copy_taps(pooling, x, od, oh, ow, window.data()), gradients.data());
      const A* gradient = gradients.data();
      for_each_run(pooling, od, oh, ow, [&](int64_t first, int64_t number) INLINED {
        for (int64_t i = 0; i < number; ++i) {
          sums[first + i] += gradient[i];
        }
        gradient += number;
      });
    }
    for (int64_t i = 0; !in_place && i < in_plane; i += S::lanes) {
      const int64_t n = std::min(S::lanes, in_plane - i);
      S::store(S::load(sums + i, n), grad_x + i, n);
    }
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(one_window)
MMSOFTPOOL_INSTANTIATE_KERNEL(one_window, double)

}  // namespace mmsoftpool::cpu
