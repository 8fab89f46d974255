// Channels last with windows that overlap: one exponential for every input, see powers.h. Sums over
// windows are taken along the width first, once for each row of the input, and then over rows. A
// vector holds neighbouring channels; a few pixels of a row are worked on at a time, so that their
// powers stay in the cache.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "powers.h"
#include "rows.h"

namespace mmsoftpool::cpu {
namespace {

// The columns [first, last) of the input, and the windows [first_out, last_out) that reach them.
struct Tile {
  int64_t first, last, first_out, last_out;

  // The columns that those windows reach.
  int64_t first_reached(const Axis& width) const {
    return std::max<int64_t>(width.first_input(first_out), 0);
  }
  int64_t last_reached(const Axis& width) const {
    return std::min(width.first_input(last_out - 1) + width.span(), width.in);
  }
};

// The rows of the input as powers, and their sums along the width, for a block of at most `vectors`
// vectors of channels and for the columns of one tile.
template <bool Relative, typename S, typename T>
class PowerPixels {
 public:
  using Vec = typename S::Vec;

  PowerPixels(
      const Pooling& pooling, int64_t vectors, int64_t columns, int64_t windows, bool whole_slices)
      : pooling_(pooling),
        powers_(pooling),
        vectors_(vectors),
        columns_(columns),
        windows_(windows),
        vector_size_((2 * columns + 2 * windows + 1) * S::lanes),
        rows_(pooling, vectors * vector_size_, 0.0f, whole_slices) {
    reached_.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
    references_.resize(reached_.capacity() * S::lanes);
    ratios_.resize(references_.size());
  }

  // For one vector of channels: powers and products of the columns, from the first reached one.
  float* row(int64_t d, int64_t h, int64_t vector) {
    return rows_.row(d, h) + vector * vector_size_;
  }

  // Makes the rows that output row (od, oh) reaches. key: one for each image, tile and block.
  // image: its first channel of `channels`.
  MMSOFTPOOL_INLINE void reach(
      const T* image, int64_t channels, int64_t key, const Tile& tile, int64_t od, int64_t oh) {
    reached_.clear();
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      if (!rows_.contains(key, d, h)) {
        float* row = rows_.claim(key, d, h);
        const T* const x =
            image + (d * pooling_.height.in + h) * pooling_.width.in * pooling_.channels;
        for (int64_t c = 0; c < channels; c += S::lanes) {
          make_row(x + c, std::min(channels - c, S::lanes), tile, row);
          row += vector_size_;
        }
      }
      reached_.push_back(rows_.row(d, h));
    });
  }

  // Then chooses one of the vectors of channels.
  MMSOFTPOOL_INLINE void choose(int64_t vector) {
    chosen_ = vector * vector_size_;
    Vec largest = S::splat(-std::numeric_limits<float>::max());
    for (const float* const row : reached_) {
      const Vec exponent = S::load(row + chosen_ + reference_place());
      largest = exponent > largest ? exponent : largest;
    }
    for (size_t r = 0; r < reached_.size(); ++r) {
      const Vec difference = S::load(reached_[r] + chosen_ + reference_place()) - largest;
      const Vec lowest = S::splat(-200);
      S::store(lowest > difference ? lowest : difference, references_.data() + r * S::lanes);
      S::store(Powers<S>::ratio(difference), ratios_.data() + r * S::lanes);
    }
  }

  size_t rows() const { return reached_.size(); }
  // Of the rows that were reached: the difference of their reference to the largest of them, and 2
  // to its power.
  MMSOFTPOOL_INLINE Vec difference(size_t r) const {
    return S::load(references_.data() + r * S::lanes);
  }
  MMSOFTPOOL_INLINE Vec ratio(size_t r) const { return S::load(ratios_.data() + r * S::lanes); }

  // The sums of a window, counted from the first one of the tile, of powers and of products.
  MMSOFTPOOL_INLINE void sums(int64_t window, Vec& sum, Vec& product) const {
    sum = product = Vec{};
    const int64_t place = chosen_ + (2 * columns_ + 2 * window) * S::lanes;
    for (size_t r = 0; r < reached_.size(); ++r) {
      const Vec row_sum = S::load(reached_[r] + place);
      Vec row_product = S::load(reached_[r] + place + S::lanes);
      if constexpr (Relative) {
        row_product += difference(r) * row_sum;
      }
      sum += ratio(r) * row_sum;
      product += ratio(r) * row_product;
    }
  }

 private:
  int64_t reference_place() const { return (2 * columns_ + 2 * windows_) * S::lanes; }

  MMSOFTPOOL_INLINE void make_row(const T* x, int64_t lanes, const Tile& tile, float* row) const {
    const Axis& width = pooling_.width;
    const int64_t first = tile.first_reached(width), number = tile.last_reached(width) - first;
    const int64_t step = pooling_.channels;
    float* const sums = row + 2 * columns_ * S::lanes;
    x += first * step;
    Vec max = S::splat(-std::numeric_limits<float>::infinity());
    for (int64_t w = 0; w < number; ++w) {
      const Vec v = S::load(x + w * step, lanes);
      S::store(v, row + 2 * w * S::lanes);
      max = v > max ? v : max;
    }
    const auto reference = powers_.reference(max);
    for (int64_t w = 0; w < number; ++w) {
      float* const at = row + 2 * w * S::lanes;
      Vec power, product;
      powers_.template power<Relative>(reference, S::load(at), power, product);
      S::store(power, at);
      S::store(product, at + S::lanes);
    }
    for (int64_t ow = tile.first_out; ow < tile.last_out; ++ow) {
      Vec sum{}, product{};
      for_each_column(width, ow, [&](int64_t w) INLINED {
        const float* const at = row + 2 * (w - first) * S::lanes;
        sum += S::load(at);
        product += S::load(at + S::lanes);
      });
      float* const to = sums + 2 * (ow - tile.first_out) * S::lanes;
      S::store(sum, to);
      S::store(product, to + S::lanes);
    }
    S::store(reference.exponent, row + reference_place());
  }

  const Pooling& pooling_;
  const Powers<S> powers_;
  const int64_t vectors_, columns_, windows_, vector_size_;
  RowCache<float> rows_;
  Pointers<float> reached_;
  std::vector<float> references_, ratios_;  // a vector for each row that was reached
  int64_t chosen_ = 0;
};

// Columns of a tile: enough that few are in two of them, and that the cache holds the powers.
int64_t tile_columns(const Axis& width) {
  return std::min(width.in, std::max<int64_t>(64, 8 * width.span()));
}

Tile make_tile(const Axis& width, int64_t first, int64_t last) {
  const auto at_least_0 = [](int64_t n) { return std::max<int64_t>(n, 0); };
  // The first window that ends behind `first`, and the one after the last that starts before last.
  const int64_t reach = first + width.padding - width.span() + 1;
  const int64_t first_out = (at_least_0(reach) + width.stride - 1) / width.stride;
  const int64_t last_out = std::min((last - 1 + width.padding) / width.stride + 1, width.out);
  return {first, last, first_out, std::max(last_out, first_out)};
}

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const Axis& width = pooling.width;
  const int64_t channels = pooling.channels, height = pooling.height.out;
  const int64_t image_rows = pooling.depth.out * height;
  const int64_t vectors = std::min<int64_t>((channels + S::lanes - 1) / S::lanes, 64 / S::lanes);
  const int64_t block = vectors * S::lanes;
  const int64_t windows = std::min(width.out, (tile_columns(width) - 1) / width.stride + 1);
  const int64_t columns = std::min(width.in, (windows - 1) * width.stride + width.span());
  PowerPixels<false, S, T> pixels(pooling, vectors, columns, windows, false);
  Pointers<const T> taps;
  int64_t key = 0;
  for (int64_t first_row = begin; first_row < end;) {
    const int64_t n = first_row / image_rows;
    const int64_t last_row = std::min(end, (n + 1) * image_rows);
    const T* const image = input + n * pooling.in_plane() * channels;
    for (int64_t first_out = 0; first_out < width.out; first_out += windows) {
      const Tile tile{0, 0, first_out, std::min(first_out + windows, width.out)};
      for (int64_t first_channel = 0; first_channel < channels; first_channel += block) {
        const int64_t number = std::min(block, channels - first_channel);
        for (int64_t row = first_row; row < last_row; ++row) {
          const int64_t od = row % image_rows / height, oh = row % height;
          pixels.reach(image + first_channel, number, key, tile, od, oh);
          T* const output_row = output + row * width.out * channels + first_channel;
          for (int64_t c = 0; c < number; c += S::lanes) {
            pixels.choose(c / S::lanes);
            const int64_t lanes = std::min(S::lanes, number - c);
            const auto store = [&](int64_t ow, Vec y)
                                   INLINED { S::store(y, output_row + ow * channels + c, lanes); };
            const auto pool = [&](int64_t ow) INLINED {
              Vec sum, product;
              pixels.sums(ow - first_out, sum, product);
              store(ow, product / sum);
              return S::is_below(sum, smallest_sum);
            };
            auto wrong = pool(first_out);
            for (int64_t ow = first_out + 1; ow < tile.last_out; ++ow) {
              wrong |= pool(ow);
            }
            if (none_of(wrong)) {
              continue;
            }
            for (int64_t ow = first_out; ow < tile.last_out; ++ow) {
              if (none_of(pool(ow))) {
                continue;
              }
              taps.clear();
              for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
                for_each_column(width, ow, [&](int64_t w) INLINED {
                  taps.push_back(
                      image + ((d * pooling.height.in + h) * width.in + w) * channels +
                      first_channel + c);
                });
              });
              window_outputs<0, S>(
                  OneVector(), taps.size(), exponents,
                  [&](int64_t t, int64_t) INLINED { return S::load_first(taps[t], lanes); },
                  [&](int64_t, Vec y) INLINED { store(ow, y); });
            }
          }
        }
        ++key;
      }
    }
    first_row = last_row;
  }
}

// Items are blocks of channels of one image.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const Axis& width = pooling.width;
  const int64_t channels = pooling.channels;
  const int64_t blocks = (channels + channel_block - 1) / channel_block;
  const int64_t vectors = (std::min(channel_block, channels) + S::lanes - 1) / S::lanes;
  const int64_t tile_width = tile_columns(width);
  // Of any tile; windows that reach into it start up to a span before and end as far behind it.
  const int64_t columns = std::min(width.in, tile_width + 2 * width.span());
  const int64_t windows = std::min(width.out, (tile_width + width.span()) / width.stride + 1);
  const bool whole_slices = GradientRows<float>::keeps_slices(pooling);
  PowerPixels<true, S, T> pixels(pooling, vectors, columns, windows, whole_slices);
  // For each pixel the sums of a, of b, and the gradients of windows that are computed in the
  // general way.
  const int64_t sums_size = 3 * columns * S::lanes;
  GradientRows<float> gradient_rows(pooling, vectors * sums_size);
  Pointers<float> sums, grads;
  Pointers<const T> taps;
  std::vector<float> shares(2 * windows * S::lanes), spread(2 * columns * S::lanes);
  std::vector<float> scratch(pooling.taps() * S::lanes);
  const Vec slope = S::splat(pooling.gradient == Gradient::exact ? ln2 : 0.0f);
  int64_t key = 0;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_channel = item % blocks * channel_block;
    const int64_t number = std::min(channel_block, channels - first_channel);
    const int64_t n = item / blocks;
    const T* const image = input + n * pooling.in_plane() * channels + first_channel;
    T* const grad_image = grad_input + n * pooling.in_plane() * channels + first_channel;
    const T* const grads_out = grad_output + n * pooling.out_plane() * channels + first_channel;
    for (int64_t first = 0; first < width.in; first += tile_width, ++key) {
      const Tile tile = make_tile(width, first, std::min(first + tile_width, width.in));
      const bool empty = tile.first_out == tile.last_out;
      const int64_t first_reached = empty ? 0 : tile.first_reached(width);
      const int64_t last_reached = empty ? 0 : tile.last_reached(width);
      const auto add_vector = [&](int64_t od, int64_t oh, int64_t c) INLINED {
        const int64_t lanes = std::min(S::lanes, number - c);
        pixels.choose(c / S::lanes);
        const T* const grad_row =
            grads_out + (od * pooling.height.out + oh) * width.out * channels + c;
        const auto grad = [&](int64_t ow)
                              INLINED { return S::load(grad_row + ow * channels, lanes); };
        const auto share = [&](int64_t ow) INLINED {
          Vec sum, product;
          pixels.sums(ow - tile.first_out, sum, product);
          const Shares<S> share(sum, product, grad(ow), pooling.gradient);
          float* const to = shares.data() + 2 * (ow - tile.first_out) * S::lanes;
          S::store(share.a, to);
          S::store(share.b, to + S::lanes);
          return share.are_wrong(sum);
        };
        auto wrong = share(tile.first_out);
        for (int64_t ow = tile.first_out + 1; ow < tile.last_out; ++ow) {
          wrong |= share(ow);
        }
        if (!none_of(wrong)) {
          for (int64_t ow = tile.first_out; ow < tile.last_out; ++ow) {
            if (none_of(share(ow))) {
              continue;
            }
            float* const to = shares.data() + 2 * (ow - tile.first_out) * S::lanes;
            S::store(Vec{}, to);
            S::store(Vec{}, to + S::lanes);
            taps.clear();
            grads.clear();
            size_t r = 0;
            for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
              float* const row = sums[r++] + c / S::lanes * sums_size;
              for_each_column(width, ow, [&](int64_t w) INLINED {
                taps.push_back(image + ((d * pooling.height.in + h) * width.in + w) * channels + c);
                grads.push_back(row + (3 * (w - first_reached) + 2) * S::lanes);
              });
            });
            window_gradients<0, S>(
                OneVector(), taps.size(), exponents, pooling.gradient,
                [&](int64_t) INLINED { return grad(ow); }, scratch.data(),
                [&](int64_t t, int64_t) INLINED { return S::load_first(taps[t], lanes); },
                [&](int64_t t, int64_t, Vec v)
                    INLINED { S::store(S::load(grads[t]) + v, grads[t]); });
          }
        }
        // Along the width, then to each row.
        std::fill(spread.begin(), spread.end(), 0.0f);
        for (int64_t ow = tile.first_out; ow < tile.last_out; ++ow) {
          const float* const from = shares.data() + 2 * (ow - tile.first_out) * S::lanes;
          const Vec a = S::load(from), b = S::load(from + S::lanes);
          for_each_column(width, ow, [&](int64_t w) INLINED {
            float* const to = spread.data() + 2 * (w - first_reached) * S::lanes;
            S::store(S::load(to) + a, to);
            S::store(S::load(to + S::lanes) + b, to + S::lanes);
          });
        }
        for (size_t r = 0; r < pixels.rows(); ++r) {
          const Vec ratio = pixels.ratio(r), difference = slope * pixels.difference(r);
          const int64_t first_column = std::max(tile.first, first_reached);
          float* to =
              sums[r] + c / S::lanes * sums_size + 3 * (first_column - first_reached) * S::lanes;
          for (int64_t w = first_column; w < std::min(tile.last, last_reached); ++w) {
            const float* const from = spread.data() + 2 * (w - first_reached) * S::lanes;
            const Vec b = S::load(from + S::lanes);
            S::store(S::load(to) + ratio * (S::load(from) + difference * b), to);
            S::store(S::load(to + S::lanes) + ratio * b, to + S::lanes);
            to += 3 * S::lanes;
          }
        }
      };
      const auto add_row = [&](int64_t od, int64_t oh) INLINED {
        if (empty) {
          return;
        }
        pixels.reach(image, number, key, tile, od, oh);
        sums.clear();
        for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
          sums.push_back(gradient_rows.claim(key, d, h));
        });
        for (int64_t c = 0; c < number; c += S::lanes) {
          add_vector(od, oh, c);
        }
      };
      const auto write_row = [&](int64_t d, int64_t h, float* sum) INLINED {
        T* const row = grad_image + (d * pooling.height.in + h) * width.in * channels;
        for (int64_t c = 0; c < number; c += S::lanes) {
          const int64_t lanes = std::min(S::lanes, number - c);
          const float* const powers = pixels.row(d, h, c / S::lanes);
          float* const row_sum = sum + c / S::lanes * sums_size;
          for (int64_t w = tile.first; w < tile.last; ++w) {
            Vec v{};
            if (sum != nullptr && w < last_reached && w >= first_reached) {
              const float* const power = powers + 2 * (w - first_reached) * S::lanes;
              const float* const at = row_sum + 3 * (w - first_reached) * S::lanes;
              v = Shares<S>::gradient(power, power + S::lanes, at, at + S::lanes, pooling.gradient);
              v += S::load(at + 2 * S::lanes);
            }
            S::store(v, row + w * channels + c, lanes);
          }
        }
        if (sum != nullptr) {
          std::fill_n(sum, vectors * sums_size, 0.0f);
        }
      };
      gradient_rows.for_each_output_row(key, add_row, write_row);
    }
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(channels_last_shared)

}  // namespace mmsoftpool::cpu
