// How the exponent alpha (x - max) of a weight is computed without overflow. No torch in here.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace mmsoftpool {

// How e^(alpha (x - max)) is computed in the type A, without overflow for any finite x and
// alpha >= 0: with d = unit * (x - max), it is e^(alpha_per_unit * d), and 0 where d <= floor.
//
// The unit is 1, except for an alpha so small that even numbers from both ends of the range of A
// have weights in one window. Their difference and the sum of such differences could overflow then;
// a power of two below 1 / taps keeps them finite, and products with it are exact.
template <typename A>
struct Exponent {
  A unit, per_unit;  // per_unit: 1 / unit
  A alpha_per_unit;
  A log2e_alpha_per_unit;  // for 2^x instead of e^x
  A floor;                 // finite: 0 * -inf would be NaN

  // exp_floor is the exponent below which e^x is 0 or counts as 0.
  Exponent(double alpha, int64_t taps, A exp_floor) {
    constexpr A max = std::numeric_limits<A>::max();
    const A rounded = A(std::fmin(alpha, double(max) / 2));  // log2e * rounded must not overflow
    // A tap adds at most 1 / (e alpha) to the sum of w (x - max), and none if x - max overflows.
    const bool overflows = rounded < 1000 * A(taps) / max;
    unit = overflows ? std::ldexp(A(1), -2 - std::ilogb(double(taps))) : A(1);
    per_unit = 1 / unit;
    alpha_per_unit = rounded * per_unit;
    log2e_alpha_per_unit = alpha_per_unit * A(1.4426950408889634);
    floor = std::fmax(exp_floor / alpha_per_unit, -max);
  }
};

}  // namespace mmsoftpool
