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

// Calls visit(first tap, their number) for the runs of neighbouring taps of window ow of row
// (od, oh) in a plane.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_run(
    const Pooling& pooling, bool one_run, int64_t od, int64_t oh, int64_t ow, Visit&& visit) {
  struct Taps {
    Taps(const Axis& axis, int64_t o)
        : first(std::max<int64_t>(axis.first_input(o), 0)),
          number(std::min(axis.first_input(o) + axis.taps(o), axis.in) - first) {}
    int64_t first, number;
  };
  const Axis &height = pooling.height, &width = pooling.width;
  const Taps columns(width, ow);
  if (one_run) {
    const Taps slices(pooling.depth, od), rows(height, oh);
    visit(
        (slices.first * height.in + rows.first) * width.in + columns.first,
        slices.number * rows.number * columns.number);
    return;
  }
  for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
    const int64_t row = (d * height.in + h) * width.in;
    if (width.dilation == 1) {
      visit(row + columns.first, columns.number);
    } else {
      for_each_column(width, ow, [&](int64_t w) INLINED { visit(row + w, int64_t(1)); });
    }
  });
}

// Calls visit(t) for the first taps of the vectors of n taps; the last two may overlap.
template <typename S, typename Visit>
MMSOFTPOOL_INLINE void for_each_start(int64_t n, Visit&& visit) {
  for (int64_t t = 0; t + S::lanes < n; t += S::lanes) {
    visit(t);
  }
  visit(n - S::lanes);
}

// The taps of a window, in memory one after the other: copied unless they are in the tensor.
template <typename S, typename T>
class Window {
 public:
  using A = typename S::Scalar;
  using Vec = typename S::Vec;

  explicit Window(const Pooling& pooling)
      : pooling_(pooling), one_run_(has_one_run(pooling)), copy_(pooling.taps() + S::lanes) {}

  // Vectors may be loaded from the last taps() on too.
  const T* taps() const { return taps_; }
  int64_t size() const { return size_; }
  Vec max() const {
    return S::broadcast(S::reduce(max_, [](auto a, auto b) INLINED { return a > b ? a : b; }));
  }

  MMSOFTPOOL_INLINE void find(const T* plane, int64_t od, int64_t oh, int64_t ow) {
    max_ = absent();
    size_ = 0;
    taps_ = copy_.data();
    for_each_run(pooling_, one_run_, od, oh, ow, [&](int64_t first, int64_t n) INLINED {
      const T* const from = plane + first;
      T* const to = copy_.data() + size_;
      size_ += n;
      if (n < S::lanes) {
        if (first + S::lanes <= pooling_.in_plane()) {
          std::copy_n(from, S::lanes, to);
        } else {
          std::copy_n(from, n, to);
        }
        add_to_max(S::lane_numbers() < S::broadcast(A(n)) ? S::load(to) : absent());
      } else if (one_run_) {
        taps_ = from;
        for_each_start<S>(n, [&](int64_t i) INLINED { add_to_max(S::load(from + i)); });
      } else {
        for_each_start<S>(n, [&](int64_t i) INLINED {
          std::copy_n(from + i, S::lanes, to + i);
          add_to_max(S::load(from + i));
        });
      }
    });
  }

  // Calls visit(tap number of the first lane, repeated, taps). Lanes without a tap hold -inf. The
  // last vector ends with the last tap: its first lanes, `repeated` of them, belong to taps of the
  // vector before it, and hold -inf too.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_vector(Visit&& visit) const {
    int64_t t = 0;
    for (; t + S::lanes <= size_; t += S::lanes) {
      visit(t, int64_t(0), S::load(taps_ + t));
    }
    if (t == size_) {
      return;
    }
    if (size_ >= S::lanes) {
      const int64_t repeated = S::lanes - (size_ - t);
      const Vec x = S::load(taps_ + t - repeated);
      visit(t - repeated, repeated, S::lane_numbers() < S::broadcast(A(repeated)) ? absent() : x);
    } else {
      const Vec x = S::load(taps_);
      visit(t, int64_t(0), S::lane_numbers() < S::broadcast(A(size_)) ? x : absent());
    }
  }

 private:
  static MMSOFTPOOL_INLINE Vec absent() { return S::splat(-std::numeric_limits<A>::infinity()); }
  MMSOFTPOOL_INLINE void add_to_max(Vec x) { max_ = x > max_ ? x : max_; }  // ignores NaN

  const Pooling& pooling_;
  bool one_run_;
  std::vector<T> copy_;
  const T* taps_ = nullptr;
  int64_t size_ = 0;
  Vec max_{};
};

// The taps between two carries of their sums.
template <typename S>
constexpr int64_t block = Softmax<S>::tap_block * S::lanes;

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  Window<S, T> window(pooling);
  for (int64_t row = begin; row < end; ++row) {
    const T* const plane = input + row / height / depth * pooling.in_plane();
    for (int64_t ow = 0; ow < width; ++ow) {
      window.find(plane, row / height % depth, row % height, ow);
      Softmax<S> softmax(exponents, window.max());
      window.for_each_vector([&](int64_t t, int64_t, auto x) INLINED {
        softmax.carry_before(t, block<S>);
        softmax.add(x);
      });
      softmax.complete(window.size(), block<S>);
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
  const int64_t in_plane = pooling.in_plane();
  const bool one_run = has_one_run(pooling);
  Window<S, T> window(pooling);
  std::vector<A> weights(pooling.taps() + S::lanes);
  constexpr bool in_place = std::is_same_v<T, A>;
  std::vector<A> converted(in_place ? 0 : in_plane);
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const x = input + plane * in_plane;
    T* const grad_x = grad_input + plane * in_plane;
    A* sums = converted.data();
    if constexpr (in_place) {
      sums = grad_x;
    }
    for (int64_t number = 0; number < pooling.out_plane(); ++number) {
      const int64_t row = number / pooling.width.out, ow = number % pooling.width.out;
      const int64_t od = row / pooling.height.out, oh = row % pooling.height.out;
      window.find(x, od, oh, ow);
      const bool is_whole_plane = number == 0 && window.size() == in_plane;
      if (number == 0 && !is_whole_plane) {
        std::fill_n(sums, in_plane, A(0));
      }
      Softmax<S> softmax(exponents, window.max());
      window.for_each_vector([&](int64_t t, int64_t repeated, Vec tap) INLINED {
        softmax.carry_before(t, block<S>);
        const Vec weight = softmax.add(tap), before = S::load(weights.data() + t);
        S::store(
            S::lane_numbers() < S::broadcast(A(repeated)) ? before : weight, weights.data() + t);
      });
      softmax.complete(window.size(), block<S>);
      softmax.merge_lanes();
      const T grad_y = grad_output[plane * pooling.out_plane() + number];
      const Vec scale = softmax.scale(S::broadcast(S::load_first(&grad_y, 1)[0]));
      const Vec offset = softmax.offset();

      const T* tap = window.taps();
      const A* weight = weights.data();
      for_each_run(pooling, one_run, od, oh, ow, [&](int64_t first, int64_t n) INLINED {
        A* const to = sums + first;
        // The sum of taps from t on.
        const auto sum = [&](int64_t t, Vec before) INLINED {
          Vec v = scale * S::load(weight + t);
          if (pooling.gradient == Gradient::exact) {
            v *= softmax.slope(S::load(tap + t), offset);
          }
          return before + v;
        };
        if (n < S::lanes) {
          const int64_t lanes = std::min(S::lanes, in_plane - first);
          const Vec before = is_whole_plane ? Vec{} : S::load(to, lanes);
          S::store(S::lane_numbers() < S::broadcast(A(n)) ? sum(0, before) : before, to, lanes);
        } else if (is_whole_plane) {
          for_each_start<S>(n, [&](int64_t t) INLINED { S::store(sum(t, Vec{}), to + t); });
        } else {
          // The last vector may overlap the one before.
          const int64_t end = n - S::lanes;
          const Vec last = sum(end, S::load(to + end));
          for (int64_t t = 0; t < end; t += S::lanes) {
            S::store(sum(t, S::load(to + t)), to + t);
          }
          S::store(last, to + end);
        }
        tap += n;
        weight += n;
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
