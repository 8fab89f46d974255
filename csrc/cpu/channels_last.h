// Channels last: a vector holds neighbouring channels of a window, and its taps lie in the tensor
// itself.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"
#include "softmax.h"

namespace mmsoftpool::cpu {

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward_channels_last(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const int64_t depth = pooling.depth.out, height = pooling.height.out;
  const int64_t channels = pooling.channels;
  Pointers<const T> rows, taps;
  rows.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
  taps.reserve(pooling.taps());
  for (int64_t row = begin; row < end; ++row) {
    const T* const image = input + row / height / depth * pooling.in_plane() * channels;
    rows.clear();
    for_each_row(
        pooling, row / height % depth, row % height,
        [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
          rows.push_back(image + (d * pooling.height.in + h) * pooling.width.in * channels);
        });
    for (int64_t ow = 0; ow < pooling.width.out; ++ow) {
      taps.clear();
      for (const T* const input_row : rows) {
        for_each_column(pooling.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
          taps.push_back(input_row + w * channels);
        });
      }
      T* const pixel = output + (row * pooling.width.out + ow) * channels;
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        const T* const* const tap = taps.data();
        int64_t c = 0;
        for (; c + S::lanes <= channels; c += S::lanes) {
          S::store(
              window_output<constant.value, S>(
                  taps.size(), exponents,
                  [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + c); }),
              pixel + c);
        }
        if (const int64_t rest = channels - c; rest > 0) {
          const auto load = [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA {
            return S::load_first(tap[t] + c, rest);
          };
          S::store_first(window_output<0, S>(taps.size(), exponents, load), pixel + c, rest);
        }
      });
    }
  }
}

// Items are blocks of channels of one image.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward_channels_last(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const int64_t channels = pooling.channels;
  const int64_t blocks = (channels + channel_block - 1) / channel_block;
  // A row of sums: channel_block numbers for each pixel.
  GradientRows<A> gradient_rows(pooling, pooling.width.in * channel_block);
  Pointers<const T> rows, taps;
  Pointers<A> sum_rows, grads;  // as the rows and the taps, in gradient_rows
  std::vector<A> scratch(pooling.taps() * S::lanes);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks;
    const int64_t first_channel = item % blocks * channel_block;
    const int64_t width = std::min(channel_block, channels - first_channel);
    const int64_t image_start = n * pooling.in_plane() * channels + first_channel;
    const T* const image = input + image_start;
    const T* const grad_image = grad_output + n * pooling.out_plane() * channels + first_channel;

    const auto add_pixel = [&](const T* grad_pixel) MMSOFTPOOL_INLINE_LAMBDA {
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        int64_t c = 0;
        const auto add = [&](int64_t t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
          S::store(S::load(grads[t] + c) + v, grads[t] + c);
        };
        for (; c + S::lanes <= width; c += S::lanes) {
          window_gradients<constant.value, S>(
              taps.size(), exponents, pooling.gradient, S::load(grad_pixel + c), scratch.data(),
              [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(taps[t] + c); }, add);
        }
        if (const int64_t rest = width - c; rest > 0) {
          window_gradients<0, S>(
              taps.size(), exponents, pooling.gradient, S::load_first(grad_pixel + c, rest),
              scratch.data(),
              [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load_first(taps[t] + c, rest); },
              add);
        }
      });
    };
    const auto add_row = [&](int64_t od, int64_t oh) MMSOFTPOOL_INLINE_LAMBDA {
      rows.clear();
      sum_rows.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
        rows.push_back(image + (d * pooling.height.in + h) * pooling.width.in * channels);
        sum_rows.push_back(gradient_rows.claim(item, d, h));
      });
      for (int64_t ow = 0; ow < pooling.width.out; ++ow) {
        taps.clear();
        grads.clear();
        for (size_t r = 0; r < rows.size(); ++r) {
          for_each_column(pooling.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
            taps.push_back(rows[r] + w * channels);
            grads.push_back(sum_rows[r] + w * channel_block);
          });
        }
        const int64_t pixel = (od * pooling.height.out + oh) * pooling.width.out + ow;
        add_pixel(grad_image + pixel * channels);
      }
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) MMSOFTPOOL_INLINE_LAMBDA {
      T* const row =
          grad_input + image_start + (d * pooling.height.in + h) * pooling.width.in * channels;
      for (int64_t w = 0; w < pooling.width.in; ++w) {
        for (int64_t c = 0; c < width; c += S::lanes) {
          A* const sum = sums != nullptr ? sums + w * channel_block + c : nullptr;
          const Vec v = sum != nullptr ? S::load(sum) : Vec{};
          if (width - c >= S::lanes) {
            S::store(v, row + w * channels + c);
          } else {
            S::store_first(v, row + w * channels + c, width - c);
          }
          if (sum != nullptr) {
            S::store(Vec{}, sum);
          }
        }
      }
    };
    gradient_rows.for_each_output_row(item, add_row, write_row);
  }
}

}  // namespace mmsoftpool::cpu
