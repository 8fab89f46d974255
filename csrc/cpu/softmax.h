// The softmax of windows, one window per lane of a vector: their outputs and gradients.
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "../exponent.h"
#include "../pooling.h"
#include "simd.h"

namespace mmsoftpool::cpu {

// A weight of e^floor or less counts as 0: ln of 2^-127, for which Simd::exp2 gives 0, or of the
// smallest normal double.
template <typename A>
constexpr A exp_floor = A(-88.02969193);
template <>
inline constexpr double exp_floor<double> = -708.3964185322641;

// The sums of a window, whose maximum is not that of its weights, are right if there is as much as
// this: taps that count as 0 are below 2^-126.
constexpr float smallest_sum = 0x1p-88f;

// Whether the vectors S serve any alpha. Those of AVX2 and AVX-512 in float save the instructions
// for an alpha that needs a unit other than 1.
template <typename S>
constexpr bool any_alpha =
    sizeof(typename S::Vec) == 16 || std::is_same_v<typename S::Scalar, double>;

template <typename A>
bool needs_any_alpha(const Pooling& pooling) {
  return Exponent<A>(pooling.alpha, pooling.taps(), exp_floor<A>).unit != 1;
}

// An Exponent in all lanes. Made once, outside of the loops.
template <typename S>
struct Exponents {
  typename S::Vec unit, alpha, log2e_alpha, floor;
  // An output is computed in halves where there is a unit: the difference to the maximum could be
  // too large. Dividing by the unit last would round small numbers more.
  typename S::Vec half_unit, per_half_unit, halves;

  MMSOFTPOOL_INLINE explicit Exponents(const Exponent<typename S::Scalar>& exponent)
      : unit(S::broadcast(exponent.unit)),
        alpha(S::broadcast(exponent.alpha_per_unit)),
        log2e_alpha(S::broadcast(exponent.log2e_alpha_per_unit)),
        floor(S::broadcast(exponent.floor)) {
    const bool is_one = exponent.unit == 1;
    half_unit = S::broadcast(is_one ? 1 : 2 * exponent.unit);
    per_half_unit = S::broadcast(is_one ? 1 : exponent.per_unit / 2);
    halves = S::broadcast(is_one ? 1 : 2);
  }

  MMSOFTPOOL_INLINE explicit Exponents(const Pooling& pooling)
      : Exponents(
            Exponent<typename S::Scalar>(
                pooling.alpha, pooling.taps(), exp_floor<typename S::Scalar>)) {}
};

// The softmax of windows over their taps in turn: eq. 1 with the maximum subtracted. With
// d = unit * (x - max), see Exponent, a weight is e^(alpha d) / sum, and the output, eq. 2, is
// max + mean / sum, where mean is the sum of e^(alpha d) d.
template <typename S>
class Softmax {
 public:
  using Vec = typename S::Vec;

  // max: the largest tap of each window.
  MMSOFTPOOL_INLINE Softmax(const Exponents<S>& exponents, Vec max)
      : exponents_(exponents), max_(at_least_lowest(any_alpha<S> ? max * exponents.unit : max)) {}

  // Adds a tap and returns its e^(alpha d), 0 for -inf. Comparisons with NaN are false: a NaN tap,
  // or inf - inf, stays NaN through both selects.
  MMSOFTPOOL_INLINE Vec add(Vec x) {
    const Vec difference = this->difference(x), d = at_least_floor(difference);
    Vec weight = S::exp2(exponents_.log2e_alpha * d);
    if constexpr (any_alpha<S>) {
      weight = difference <= exponents_.floor ? Vec{} : weight;
    }
    sum_ += weight;
    mean_ += weight * d;
    return weight;
  }

  // A sum of millions of taps would lose digits: before every `block` of them, number t, but the
  // first, the sums so far are moved to totals. complete() is for after the last tap.
  MMSOFTPOOL_INLINE void carry_before(int64_t t, int64_t block = tap_block) {
    if ((t & (block - 1)) == 0 && t > 0) {
      carry();
    }
  }
  MMSOFTPOOL_INLINE void complete(int64_t taps, int64_t block = tap_block) {
    if (taps > block) {
      carry();
      sum_ = total_[0];
      mean_ = total_[1];
    }
  }
  static constexpr int64_t tap_block = 64;

  // Makes one window of those of all lanes, which have the same max.
  MMSOFTPOOL_INLINE void merge_lanes() {
    const auto add = [](auto a, auto b) INLINED { return a + b; };
    sum_ = S::broadcast(S::reduce(sum_, add));
    mean_ = S::broadcast(S::reduce(mean_, add));
  }

  // Eq. 2. No weight at all means nothing but -inf.
  MMSOFTPOOL_INLINE Vec output() const {
    Vec y;
    if constexpr (any_alpha<S>) {
      const Vec below = mean_ / (sum_ * exponents_.half_unit);
      y = (max_ * exponents_.per_half_unit + below) * exponents_.halves;
    } else {
      y = max_ + mean_ / sum_;
    }
    return sum_ == Vec{} ? S::splat(-std::numeric_limits<typename S::Scalar>::infinity()) : y;
  }

  // The gradient of a tap is scale times what add() returned, and times slope if it is exact:
  // 1 + alpha (x - y) = alpha d + offset.
  MMSOFTPOOL_INLINE Vec scale(Vec grad_output) const { return grad_output / positive_sum(); }
  MMSOFTPOOL_INLINE Vec offset() const {
    return S::splat(1) - exponents_.alpha * (mean_ / positive_sum());
  }
  MMSOFTPOOL_INLINE Vec slope(Vec x, Vec offset) const {
    return exponents_.alpha * at_least_floor(difference(x)) + offset;
  }

 private:
  // In a window of -inf alone x - max must not be -inf + inf. (It also keeps GCC from taking max *
  // unit, and not x * unit, into the fused multiply-add of difference(), for every tap again.)
  static MMSOFTPOOL_INLINE Vec at_least_lowest(Vec x) {
    const Vec lowest = S::splat(std::numeric_limits<typename S::Scalar>::lowest());
    return lowest > x ? lowest : x;
  }

  MMSOFTPOOL_INLINE Vec difference(Vec x) const {
    if constexpr (any_alpha<S>) {
      x *= exponents_.unit;
    }
    return x - max_;
  }
  MMSOFTPOOL_INLINE Vec at_least_floor(Vec difference) const {
    return exponents_.floor > difference ? exponents_.floor : difference;
  }

  // The largest tap has a weight of 1: a sum below is one of no weight at all, whose mean is 0.
  MMSOFTPOOL_INLINE Vec positive_sum() const {
    const Vec half = S::splat(0.5);
    return half > sum_ ? half : sum_;
  }

  // Kahan's summation.
  MMSOFTPOOL_INLINE void carry() {
    const auto add = [this](int i, Vec& part) INLINED {
      const Vec x = part - lost_[i], total = total_[i] + x;
      lost_[i] = (total - total_[i]) - x;
      total_[i] = total;
      part = Vec{};
    };
    add(0, sum_);
    add(1, mean_);
  }

  Exponents<S> exponents_;
  Vec max_;  // times the unit
  Vec sum_ = Vec{};
  Vec mean_ = Vec{};
  Vec total_[2] = {}, lost_[2] = {};  // of sum_ and mean_
};

// The functions below compute a vector of windows for every number in `Vectors`: more than one at
// once pays for many taps. K is the number of taps of a window where it is known when compiling,
// else 0, and load(t, i) returns tap t of vector i.
using OneVector = std::make_index_sequence<1>;

// The softmax of the windows; visit(t, i, e^(alpha d)) is called for their taps.
template <int K, typename S, size_t... I, typename Load, typename Visit, typename Use>
MMSOFTPOOL_INLINE void with_softmax(
    std::index_sequence<I...>, int64_t taps, const Exponents<S>& exponents, Load&& load,
    Visit&& visit, Use&& use) {
  using Vec = typename S::Vec;
  const int64_t n = K ? K : taps;
  // Comparisons ignore NaN.
  Vec max[] = {
      (static_cast<void>(I), S::splat(-std::numeric_limits<typename S::Scalar>::infinity()))...};
  for (int64_t t = 0; t < n; ++t) {
    const Vec x[] = {load(t, I)...};
    ((max[I] = x[I] > max[I] ? x[I] : max[I]), ...);
  }
  Softmax<S> softmax[] = {{exponents, max[I]}...};
  for (int64_t t = 0; t < n; ++t) {
    if constexpr (K == 0) {
      (softmax[I].carry_before(t), ...);
    }
    (visit(t, I, softmax[I].add(load(t, I))), ...);
  }
  if constexpr (K == 0) {
    (softmax[I].complete(n), ...);
  }
  use(softmax);
}

// Calls store(i, outputs of vector i).
template <int K, typename S, size_t... I, typename Load, typename Store>
MMSOFTPOOL_INLINE void window_outputs(
    std::index_sequence<I...> vectors, int64_t taps, const Exponents<S>& exponents, Load&& load,
    Store&& store) {
  const auto ignore = [](int64_t, int64_t, typename S::Vec) INLINED {};
  with_softmax<K, S>(
      vectors, taps, exponents, load, ignore,
      [&](const Softmax<S>* softmax) INLINED { (store(I, softmax[I].output()), ...); });
}

// Calls add(t, i, gradient of tap t). `scratch` has room for all taps of all vectors; where their
// number is known, registers do.
template <int K, typename S, size_t... I, typename Grad, typename Load, typename Add>
MMSOFTPOOL_INLINE void window_gradients(
    std::index_sequence<I...> vectors, int64_t taps, const Exponents<S>& exponents,
    Gradient gradient, Grad&& grad_output, typename S::Scalar* scratch, Load&& load, Add&& add) {
  using Vec = typename S::Vec;
  constexpr int64_t number = sizeof...(I);
  const int64_t n = K ? K : taps;
  Vec registers[K ? K * number : 1];
  const auto keep = [&](int64_t t, int64_t i, Vec weight) INLINED {
    if constexpr (K != 0) {
      registers[t * number + i] = weight;
    } else {
      S::store(weight, scratch + (t * number + i) * S::lanes);
    }
  };
  const auto weight = [&](int64_t t, int64_t i) INLINED {
    return K ? registers[t * number + i] : S::load(scratch + (t * number + i) * S::lanes);
  };
  with_softmax<K, S>(vectors, taps, exponents, load, keep, [&](const Softmax<S>* softmax) INLINED {
    const Vec scale[] = {softmax[I].scale(grad_output(I))...};
    if (gradient == Gradient::paper) {
      for (int64_t t = 0; t < n; ++t) {
        (add(t, I, scale[I] * weight(t, I)), ...);
      }
      return;
    }
    const Vec offset[] = {softmax[I].offset()...};
    for (int64_t t = 0; t < n; ++t) {
      (add(t, I, scale[I] * weight(t, I) * softmax[I].slope(load(t, I), offset[I])), ...);
    }
  });
}

// Runs body(std::integral_constant<int, K>) with the number of taps as a constant for the windows
// that networks have.
template <typename Body>
MMSOFTPOOL_INLINE void with_taps(int64_t taps, Body&& body) {
  switch (taps) {
    case 4:
      return body(std::integral_constant<int, 4>());
    case 9:
      return body(std::integral_constant<int, 9>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

}  // namespace mmsoftpool::cpu
