// The 3 x 3 windows of stride 1: each input has one exponential, not one for every window around
// it.
#pragma once

#include "strip.h"

namespace mmsoftpool::cuda {

// Calls visit(column, channel) for `Number` columns.
template <int Number, int Channels, typename Visit>
MMSOFTPOOL_BODY void for_each_column(const Visit& visit) {
  MMSOFTPOOL_UNROLL
  for (int j = 0; j < Number; ++j) {
    MMSOFTPOOL_UNROLL
    for (int c = 0; c < Channels; ++c) {
      visit(j, c);
    }
  }
}

// Sums over three rows and three columns, while rows come in. What sums share is added up once.
template <int Number, int Channels>
struct SlidingSums {
  // Over three columns, of the last row and of the last two.
  float last[Number][Channels] = {}, pair[Number][Channels] = {};

  MMSOFTPOOL_BODY void add_row(
      const float (&row)[Number + 2][Channels], float (&sums)[Number][Channels]) {
    for_each_column<Number, Channels>([&](int j, int c) {
      // Columns 2 i and 2 i + 1 share two.
      const int even = j - j % 2;
      const float two = row[even + 1][c] + row[even + 2][c];
      const float three = row[j % 2 == 0 ? j : j + 2][c] + two;
      sums[j][c] = pair[j][c] + three;
      pair[j][c] = last[j][c] + three;
      last[j][c] = three;
    });
  }
};

// A strip whose thread takes the power 2^(c x - reference), c = alpha log2 e, of each input, and
// sums of powers over windows. The reference, the largest tap of the strip's first windows,
// cancels in every window; it only sets the range. Where the range does not suffice (a window far
// from the reference, NaN, infinity), the thread computes all its windows again in the way of
// Strip.
template <typename T, int K, int S, int Pad, int Cols, int Channels, bool Packed>
struct SumStrip : Strip<T, K, S, Pad, Cols, Channels, Packed> {
  static_assert(K == 3 && S == 1 && Pad == 1);

  using Base = Strip<T, K, S, Pad, Cols, Channels, Packed>;
  using typename Base::Arguments;
  using typename Base::Place;

  // Logarithms have few rounding errors if sums are within this range, and taps of a power of 0
  // do not count.
  static MMSOFTPOOL_BODY bool is_in_range(float sum) {
    return (sum >= 0x1p-40f) & (sum <= 0x1p40f);
  }
  static MMSOFTPOOL_BODY bool is_finite(float x) {
    return fabsf(x) <= std::numeric_limits<float>::max();
  }
  // Whether column j of the output, from the strip's first one on, is one. The columns beside a
  // row of whole packs have a gradient of 0 and powers like the others.
  template <bool Checked>
  static MMSOFTPOOL_BODY bool is_output(const Arguments& a, int32_t ow, int j) {
    return (Channels == 1 ? Packed : !Checked) || uint32_t(ow + j) < uint32_t(a.out_w);
  }

  struct Reference {
    float log2[Channels];     // of the powers
    float outside[Channels];  // an input of a power of 0
    bool fits = true;

    // The largest tap of the first row of windows.
    MMSOFTPOOL_BODY Reference(const Arguments& a, const T* input, const Place& place) {
      float max[Cols + 2][Channels], row[Cols + 2][Channels];
      for_each_column<Cols + 2, Channels>([&](int j, int c) { max[j][c] = -Base::infinity; });
      MMSOFTPOOL_NO_UNROLL
      for (int k = -1; k <= 1; ++k) {
        Base::template read_input_row<Cols + 2, 1, true>(a, input, place.oh + k, place.ow - 1, row);
        for_each_column<Cols + 2, Channels>(
            [&](int j, int c) { max[j][c] = fmaxf(max[j][c], row[j][c]); });
      }
      for_each_column<Cols + 2, Channels>(
          [&](int j, int c) { max[0][c] = fmaxf(max[0][c], max[j][c]); });
      for_each_column<1, Channels>([&](int, int c) {
        log2[c] = max[0][c] * a.log2e_alpha;
        outside[c] = max[0][c] - 200 * a.per_log2e_alpha;
        fits &= fabsf(log2[c]) <= 0x1p20f;
      });
    }
  };

  // Calls row(Checked, oh) up to `end`; the rows [begin, inner) need no checks.
  template <typename Row>
  static MMSOFTPOOL_BODY void for_each_row(
      int32_t oh, int32_t begin, int32_t inner, int32_t end, const Row& row) {
    while (oh < end) {
      if (oh >= begin) {
        // Two at once, so that what a row leaves to the next need not move to its place there.
        MMSOFTPOOL_UNROLL_TWICE
        for (; oh < inner; ++oh) {
          row(std::false_type(), oh);
        }
      }
      if (oh < end) {
        row(std::true_type(), oh);
        ++oh;
      }
    }
  }

  struct ForwardState {
    SlidingSums<Cols, Channels> sums, means;
    float middle[Cols][Channels];  // of the windows: the last row
    bool is_right;
  };

  // Reads row oh + 1, the last one of the windows of row oh, and writes these windows' outputs. The
  // first calls, up to row place.oh, only read.
  template <bool Checked>
  static MMSOFTPOOL_BODY void forward_row(
      const Arguments& a, const Reference& reference, const T* input, T* output, int32_t oh,
      const Place& place, ForwardState& state) {
    float x[Cols + 2][Channels], power[Cols + 2][Channels], product[Cols + 2][Channels];
    Base::template read_row<Cols + 2, 1, Checked>(
        a, input, a.in_h, a.in_w, oh + 1, place.ow - 1, reference.outside, x);
    for_each_column<Cols + 2, Channels>([&](int j, int c) {
      power[j][c] = exp2_or_zero(std::fma(x[j][c], a.log2e_alpha, -reference.log2[c]));
      product[j][c] = power[j][c] * x[j][c];
    });
    float sum[Cols][Channels], result[Cols][Channels];
    state.sums.add_row(power, sum);
    state.means.add_row(product, result);
    if (!Checked || oh >= place.oh) {
      for_each_column<Cols, Channels>([&](int j, int c) {
        float y = result[j][c] * reciprocal(sum[j][c]);
        state.is_right &=
            (is_in_range(sum[j][c]) & is_finite(y)) | !is_output<Checked>(a, place.ow, j);
        if (sizeof(T) == 4) {
          // Within the rounding error of the middle input it is that: a window of one value.
          const float middle = state.middle[j][c];
          y = fabsf(y - middle) <= 0x1p-21f * fabsf(middle) ? middle : y;
        }
        result[j][c] = y;
      });
      Base::template write_row<Checked>(a, a.out_w, result, output, oh, place.ow);
    }
    for_each_column<Cols, Channels>([&](int j, int c) { state.middle[j][c] = x[j + 1][c]; });
  }

  // False if some results are wrong.
  static MMSOFTPOOL_BODY bool forward_by_sums(
      const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place = Base::find_place(a, i);
    input += place.input;
    output += place.output;
    const Reference reference(a, input, place);
    const int32_t end = place.oh + a.rows < a.out_h ? place.oh + a.rows : a.out_h;
    int32_t inner = a.inner_h < end ? a.inner_h : end;
    if (Channels > 1 &&
        (place.ow == 0 || place.ow + Cols + 1 > a.in_w || place.ow + Cols > a.out_w)) {
      inner = 0;
    }
    ForwardState state;
    state.is_right = reference.fits;
    for_each_row(place.oh - 2, place.oh, inner, end, [&](auto checked, int32_t oh) {
      forward_row<decltype(checked)::value>(a, reference, input, output, oh, place, state);
    });
    return state.is_right;
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    if (!forward_by_sums(a, input, output, i)) {
      Base::forward(a, input, output, i);
    }
  }

  // The strip's own columns and one on either side have windows; two on either side are read.
  struct BackwardState {
    SlidingSums<Cols + 2, Channels> sums, means;   // of the windows
    SlidingSums<Cols, Channels> scales, products;  // of what windows add to a gradient
    float log2[2][Cols][Channels];                 // of the powers of the last two rows
    bool is_right;
  };

  // Reads row oh + 1, the last one of the windows of row oh, and the gradients of these windows,
  // the last ones around row oh - 1, and writes that row's gradients. The first calls only read.
  //
  // The gradient of input i is, with its power p_i = 2^(v_i) and the sum S and mean logarithm m of
  // the powers of each window around it, the sum of g p_i / S (1 + ln 2 (v_i - m)).
  template <bool Checked>
  static MMSOFTPOOL_BODY void backward_row(
      const Arguments& a, const Reference& reference, const T* grad_output, const T* input,
      T* grad_input, int32_t oh, const Place& place, BackwardState& state) {
    float x[Cols + 4][Channels], power[Cols + 4][Channels], product[Cols + 4][Channels];
    Base::template read_row<Cols + 4, 2, Checked>(
        a, input, a.in_h, a.in_w, oh + 1, place.ow - 2, reference.outside, x);
    for_each_column<Cols + 4, Channels>([&](int j, int c) {
      x[j][c] = std::fma(x[j][c], a.log2e_alpha, -reference.log2[c]);
      power[j][c] = exp2_or_zero(x[j][c]);
      product[j][c] = power[j][c] * x[j][c];
    });
    float scale[Cols + 2][Channels], mean[Cols + 2][Channels];
    state.sums.add_row(power, scale);
    state.means.add_row(product, mean);
    if (!Checked || oh >= place.oh - 1) {
      constexpr float zeros[Channels] = {};
      float grad[Cols + 2][Channels];
      Base::template read_row<Cols + 2, 1, Checked>(
          a, grad_output, a.out_h, a.out_w, oh, place.ow - 1, zeros, grad);
      for_each_column<Cols + 2, Channels>([&](int j, int c) {
        const float sum = is_output<Checked>(a, place.ow, j - 1) ? scale[j][c] : 1;
        state.is_right &= is_in_range(sum);
        const float per_sum = reciprocal(sum);
        scale[j][c] = grad[j][c] * per_sum;
        mean[j][c] = scale[j][c] * (mean[j][c] * per_sum);
      });
      float result[Cols][Channels], means[Cols][Channels];
      state.scales.add_row(scale, result);
      state.products.add_row(mean, means);
      if (!Checked || oh > place.oh) {
        for_each_column<Cols, Channels>([&](int j, int c) {
          const float v = state.log2[0][j][c];
          result[j][c] =
              exp2_or_zero(v) * (result[j][c] + a.slope * (v * result[j][c] - means[j][c]));
          state.is_right &= is_finite(result[j][c]);
        });
        Base::template write_row<Checked>(a, a.in_w, result, grad_input, oh - 1, place.ow);
      }
    }
    for_each_column<Cols, Channels>([&](int j, int c) {
      state.log2[0][j][c] = state.log2[1][j][c];
      state.log2[1][j][c] = x[j + 2][c];
    });
  }

  // False if some results are wrong.
  static MMSOFTPOOL_BODY bool backward_by_sums(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    const Place place = Base::find_place(a, i);
    grad_output += place.output;
    input += place.input;
    grad_input += place.input;
    const Reference reference(a, input, place);
    const int32_t end = (place.oh + a.rows < a.in_h ? place.oh + a.rows : a.in_h) + 1;
    int32_t inner = a.inner_h < end ? a.inner_h : end;
    if (Channels > 1 &&
        (place.ow < 2 || place.ow + Cols + 2 > a.in_w || place.ow + Cols + 1 > a.out_w)) {
      inner = 0;
    }
    BackwardState state;
    state.is_right = reference.fits;
    for_each_row(place.oh - 3, place.oh + 1, inner, end, [&](auto checked, int32_t oh) {
      backward_row<decltype(checked)::value>(
          a, reference, grad_output, input, grad_input, oh, place, state);
    });
    return state.is_right;
  }

  static MMSOFTPOOL_BODY void backward(
      const Arguments& a, const T* grad_output, const T* input, T* grad_input, uint32_t i) {
    if (!backward_by_sums(a, grad_output, input, grad_input, i)) {
      Base::backward(a, grad_output, input, grad_input, i);
    }
  }
};

}  // namespace mmsoftpool::cuda
