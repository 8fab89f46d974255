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

// The taps of a window: runs of neighbours, which are equally long. More than one run, or a short
// one, is copied.
template <typename S, typename T>
class Window {
 public:
  using A = typename S::Scalar;
  using Vec = typename S::Vec;

  explicit Window(const Pooling& pooling)
      : pooling_(pooling), one_run_(has_one_run(pooling)), copy_(pooling.taps() / S::lanes + 2) {}

  int64_t size() const { return run_ * int64_t(starts_.size()); }
  const std::vector<int64_t>& starts() const { return starts_; }  // of the runs, in the plane
  int64_t run() const { return run_; }
  int64_t end() const { return starts_.empty() ? 0 : starts_.back() + run_; }
  bool one_run() const { return one_run_; }
  // Where the taps are copied to; has room for a vector more.
  A* copy() { return copy_[0].numbers; }

  // Goes to window ow of row (od, oh).
  void find(int64_t od, int64_t oh, int64_t ow) {
    struct Taps {
      Taps(const Axis& axis, int64_t o)
          : first(std::max<int64_t>(axis.first_input(o), 0)),
            number(std::min(axis.first_input(o) + axis.taps(o), axis.in) - first) {}
      int64_t first, number;
    };
    const Axis &height = pooling_.height, &width = pooling_.width;
    const Taps columns(width, ow);
    starts_.clear();
    if (one_run_) {
      const Taps slices(pooling_.depth, od), rows(height, oh);
      starts_.push_back((slices.first * height.in + rows.first) * width.in + columns.first);
      run_ = slices.number * rows.number * columns.number;
      return;
    }
    run_ = width.dilation == 1 ? columns.number : 1;
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      const int64_t row = (d * height.in + h) * width.in;
      if (width.dilation == 1) {
        starts_.push_back(row + columns.first);
      } else {
        for_each_column(width, ow, [&](int64_t w) INLINED { starts_.push_back(row + w); });
      }
    });
  }

  // Reads the taps and returns the largest.
  MMSOFTPOOL_INLINE Vec read(const T* plane) {
    in_place_ = one_run_ && run_ >= S::lanes ? plane + starts_[0] : nullptr;
    Vec max = absent();
    A* to = copy();
    for (const int64_t start : starts_) {
      const T* const from = plane + start;
      if (run_ < S::lanes) {
        const Vec x = S::load(from, std::min(S::lanes, pooling_.in_plane() - start));
        S::store(x, to);
        max = larger(first_lanes(x, run_), max);
      } else {
        const auto visit = [&](int64_t i) INLINED {
          const Vec x = S::load(from + i);
          if (in_place_ == nullptr) {
            S::store(x, to + i);
          }
          max = larger(x, max);
        };
        const int64_t last = run_ - S::lanes;  // may overlap the vector before
        for (int64_t i = 0; i < last; i += S::lanes) {
          visit(i);
        }
        visit(last);
      }
      to += run_;
    }
    return S::broadcast(S::reduce(max, [](auto a, auto b) INLINED { return a > b ? a : b; }));
  }

  // Calls visit(number of the first tap, taps) for all vectors in turn. Lanes without a tap hold
  // -inf.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_vector(Visit&& visit) {
    const int64_t n = size(), whole = n / S::lanes * S::lanes;
    for (int64_t t = 0; t < whole; t += S::lanes) {
      visit(t, in_place_ != nullptr ? S::load(in_place_ + t) : S::load(copy() + t));
    }
    if (whole < n) {
      const Vec x = in_place_ != nullptr ? S::load_first(in_place_ + whole, n - whole)
                                         : S::load(copy() + whole);
      visit(whole, first_lanes(x, n - whole));
    }
  }

 private:
  struct alignas(sizeof(Vec)) Aligned {
    A numbers[S::lanes];
  };

  static MMSOFTPOOL_INLINE Vec absent() { return S::splat(-std::numeric_limits<A>::infinity()); }
  static MMSOFTPOOL_INLINE Vec first_lanes(Vec x, int64_t n) {
    return S::lane_numbers() < S::broadcast(A(n)) ? x : absent();
  }
  static MMSOFTPOOL_INLINE Vec larger(Vec x, Vec max) { return x > max ? x : max; }  // not NaN

  const Pooling& pooling_;
  bool one_run_;
  std::vector<Aligned> copy_;
  std::vector<int64_t> starts_;
  int64_t run_ = 0;
  const T* in_place_ = nullptr;
};

// The taps between two carries of their sums.
template <typename S>
constexpr int64_t block = Softmax<S>::tap_block * S::lanes;

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = FastSimd<T, Bytes>;
  const Exponents<S> exponents(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  Window<S, T> window(pooling);
  for (int64_t row = begin; row < end; ++row) {
    const T* const plane = input + row / height / depth * pooling.in_plane();
    for (int64_t ow = 0; ow < width; ++ow) {
      window.find(row / height % depth, row % height, ow);
      Softmax<S> softmax(exponents, window.read(plane));
      window.for_each_vector([&](int64_t t, auto x) INLINED {
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
  using S = FastSimd<T, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const int64_t in_plane = pooling.in_plane();
  const bool exact = pooling.gradient == Gradient::exact;
  Window<S, T> window(pooling);
  constexpr bool in_place = std::is_same_v<T, A>;
  std::vector<A> converted(in_place ? 0 : in_plane);
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const x = input + plane * in_plane;
    T* const grad_x = grad_input + plane * in_plane;
    A* sums = converted.data();
    if constexpr (in_place) {
      sums = grad_x;
    }
    int64_t reached = 0;  // the end of the sums that are set
    // Sets those before `end` to 0. The inputs there are needed soon, and come faster in turn than
    // run by run.
    const auto clear = [&](int64_t end) INLINED {
      for (int64_t i = reached; i < end; i += S::lanes) {
        S::store(Vec{}, sums + i, std::min(S::lanes, in_plane - i));
        __builtin_prefetch(x + i);
      }
    };
    for (int64_t number = 0; number < pooling.out_plane(); ++number) {
      const int64_t row = number / pooling.width.out, ow = number % pooling.width.out;
      window.find(row / pooling.height.out, row % pooling.height.out, ow);
      const int64_t n = window.run();
      if (window.one_run()) {  // what is not reached yet is set, but for the end of a vector
        const int64_t first_new = std::max(reached, window.end() - n);
        clear(std::min(in_plane, first_new + std::min(n, S::lanes)));
      } else {
        clear(window.end());
        reached = std::max(reached, window.end());
      }
      A* const weights = window.copy();
      Softmax<S> softmax(exponents, window.read(x));
      window.for_each_vector([&](int64_t t, Vec tap) INLINED {
        softmax.carry_before(t, block<S>);
        S::store(softmax.add(tap), weights + t);
        __builtin_prefetch(sums + window.starts()[0] + t, 1);  // for the gradients of one run
      });
      softmax.complete(window.size(), block<S>);
      softmax.merge_lanes();
      const T grad_y = grad_output[plane * pooling.out_plane() + number];
      const Vec scale = softmax.scale(S::broadcast(S::load_first(&grad_y, 1)[0]));
      const Vec offset = softmax.offset();

      const A* weight = weights;
      for (const int64_t start : window.starts()) {
        A* const to = sums + start;
        const auto gradient = [&](int64_t t, auto lanes) INLINED {
          const Vec v = scale * S::load(weight + t);
          return exact ? v * softmax.slope(S::load(x + start + t, lanes), offset) : v;
        };
        if (n < S::lanes) {
          const int64_t lanes = std::min(S::lanes, in_plane - start);
          const Vec v = S::masked(gradient(0, lanes), S::first_lanes(n));
          S::store(S::load(to, lanes) + v, to, lanes);
        } else {
          const auto sum = [&](int64_t t) INLINED {
            const Vec v = gradient(t, typename S::All());
            return start + t < reached ? S::load(to + t) + v : v;
          };
          // The last vector may overlap the one before.
          const int64_t end = n - S::lanes;
          const Vec last = sum(end);
          for (int64_t t = 0; t < end; t += S::lanes) {
            S::store(sum(t), to + t);
          }
          S::store(last, to + end);
        }
        weight += n;
      }
      reached = std::max(reached, window.end());
    }
    clear(in_plane);
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
