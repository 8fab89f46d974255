// 3 x 3 windows of stride 1: each input has one exponential, not one for every window around it.
#pragma once

#include "strip.h"

namespace mmsoftpool::cuda {

// The sums of three rows and three columns around each of `Number` columns, while rows come in.
template <int Number, int Channels>
struct SlidingSums {
  // Of three columns, in the last row and in the last two.
  float last[Number][Channels], pair[Number][Channels];

  MMSOFTPOOL_BODY void clear() {
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Number; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        last[j][c] = pair[j][c] = 0;
      }
    }
  }
  MMSOFTPOOL_BODY void add_row(
      const float (&row)[Number + 2][Channels], float (&sums)[Number][Channels]) {
    MMSOFTPOOL_UNROLL
    for (int c = 0; c < Channels; ++c) {
      float two = 0;  // what two neighbouring sums share
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Number; ++j) {
        if (j % 2 == 0) {
          two = row[j + 1][c] + row[j + 2][c];
        }
        const float three = two + row[j % 2 == 0 ? j : j + 2][c];
        sums[j][c] = pair[j][c] + three;
        pair[j][c] = last[j][c] + three;
        last[j][c] = three;
      }
    }
  }
};

template <typename T, int Cols, int Channels, bool Packed>
struct SumStrip : Strip<T, 3, 1, 1, Cols, Channels, Packed> {
  using Base = Strip<T, 3, 1, 1, Cols, Channels, Packed>;
  using typename Base::Arguments;
  using typename Base::Place;

  static constexpr float smallest_sum = 0x1p-24f, largest_sum = 0x1p24f;

  // The powers are relative to one of the strip's inputs, by channel.
  struct Reference {
    float t[Channels];        // its logarithm
    float outside[Channels];  // an input of a power of 0
    bool fits = true;

    MMSOFTPOOL_BODY Reference(const Arguments& a, const T* input, const Place& place) {
      float row[Cols][Channels];
      read_own(a, input, place, row);
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        float max = row[0][c];
        MMSOFTPOOL_UNROLL
        for (int j = 1; j < Cols; ++j) {
          max = fmaxf(max, row[j][c]);
        }
        t[c] = max * a.log2e_alpha;
        outside[c] = max - 200 * a.per_log2e_alpha;
        fits &= fabsf(t[c]) <= 0x1p20f;
      }
    }
    static MMSOFTPOOL_BODY void read_own(
        const Arguments& a, const T* input, const Place& place, float (&row)[Cols][Channels]) {
      Base::template read_input_row<Cols, 0, true>(a, input, place.oh, place.ow, row);
    }
  };

  struct ForwardState {
    SlidingSums<Cols, Channels> sums, means;
    float middle[Cols][Channels];
    bool right;
  };

  template <bool Checked, bool Write>
  static MMSOFTPOOL_BODY void forward_row(
      const Arguments& a, const Reference& reference, const T* input, T* output, int32_t oh,
      int32_t ow, ForwardState& state) {
    float x[Cols + 2][Channels], power[Cols + 2][Channels], product[Cols + 2][Channels];
    Base::template read_row<Cols + 2, 1, Checked>(
        a, input, a.in_h, a.in_w, oh + 1, ow - 1, reference.outside, x);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Cols + 2; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        power[j][c] = exp2_or_zero(std::fma(x[j][c], a.log2e_alpha, -reference.t[c]));
        product[j][c] = power[j][c] * x[j][c];
      }
    }
    float sum[Cols][Channels], result[Cols][Channels];
    state.sums.add_row(power, sum);
    state.means.add_row(product, result);
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Cols; ++j) {
      MMSOFTPOOL_UNROLL
      for (int c = 0; c < Channels; ++c) {
        if (Write) {
          float y = result[j][c] * reciprocal(sum[j][c]);
          const bool is_output = (Channels == 1 ? Packed : !Checked) || ow + j < a.out_w;
          const bool right = sum[j][c] >= smallest_sum && sum[j][c] <= largest_sum &&
                             fabsf(y) <= std::numeric_limits<float>::max();
          state.right &= right || !is_output;
          if (sizeof(T) == 4) {
            const float middle = state.middle[j][c];
            y = fabsf(y - middle) <= 0x1p-21f * fabsf(middle) ? middle : y;
          }
          result[j][c] = y;
        }
        state.middle[j][c] = x[j + 1][c];
      }
    }
    if (Write) {
      Base::template write_row<Checked>(a, result, output, oh, ow);
    }
  }

  static MMSOFTPOOL_BODY bool forward_by_sums(
      const Arguments& a, const T* input, T* output, const Place& place) {
    const Reference reference(a, input, place);
    const int32_t ow = place.ow;
    const int32_t end = place.oh + a.rows < a.out_h ? place.oh + a.rows : a.out_h;
    int32_t inner = a.inner_h < end ? a.inner_h : end;
    if (Channels > 1 && (ow == 0 || ow + Cols + 1 > a.in_w || ow + Cols > a.out_w)) {
      inner = 0;
    }
    ForwardState state;
    state.right = reference.fits;
    state.sums.clear();
    state.means.clear();
    int32_t oh = place.oh;
    forward_row<true, false>(a, reference, input, output, oh - 2, ow, state);
    forward_row<true, false>(a, reference, input, output, oh - 1, ow, state);
    while (oh < end) {
      MMSOFTPOOL_NO_UNROLL
      for (; oh < inner; ++oh) {
        forward_row<false, true>(a, reference, input, output, oh, ow, state);
      }
      if (oh < end) {
        forward_row<true, true>(a, reference, input, output, oh, ow, state);
        ++oh;
      }
    }
    return state.right;
  }

  static MMSOFTPOOL_BODY void forward(const Arguments& a, const T* input, T* output, uint32_t i) {
    const Place place = Base::find_place(a, i);
    if (!forward_by_sums(a, input + place.input, output + place.output, place)) {
      Base::forward(a, input, output, i);
    }
  }
};

}  // namespace mmsoftpool::cuda
