// Windows that overlap: one exponential for every input, see powers.h. Sums over windows are taken
// along the width first, once for each row of the input, and then over rows.
//
// Both layouts have split rows. A position of one holds `step` numbers: one, and a vector has those
// of neighbouring windows; or, channels last, a vector of channels. Below, places and sizes count
// numbers. Channels last works on a block of channels at a time; a contiguous plane is a block of
// one channel.
#include <algorithm>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "powers.h"
#include "rows.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// The rows of the input as powers, and their sums along the width. Products are those of
// Powers::power.
template <bool Last, bool Relative, typename S, typename T>
class PowerRows {
 public:
  using Vec = typename S::Vec;
  static constexpr int64_t step = Last ? S::lanes : 1;
  static constexpr int64_t slack = Last ? 0 : S::lanes;

  // For blocks of that many channels.
  PowerRows(const Pooling& pooling, int64_t block, bool whole_slices)
      : channels(Last ? pooling.channels : 1),
        vectors((std::min(block, channels) + S::lanes - 1) / S::lanes),
        layout(pooling.width, slack, Last),
        size(layout.size * step),
        size_with_row(Last ? size : layout.size_with_row()),
        part(layout.part * step),
        windows(pooling.width.out * step),
        pooling_(pooling),
        powers_(pooling),
        room_((windows + S::lanes - 1) / S::lanes * S::lanes),
        vector_size_(2 * size + 2 * room_ + S::lanes),
        rows_(pooling, vectors * vector_size_, 0.0f, whole_slices),
        x_(size_with_row, -std::numeric_limits<float>::infinity()) {
    for (int64_t k = 0; k < pooling.width.kernel_size; ++k) {
      offsets.push_back(layout.offset(k) * step);
    }
    reached_.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
    differences_.resize(reached_.capacity() * S::lanes);
    ratios_.resize(differences_.size());
  }

  // Makes the rows that output row (od, oh) reaches. key: one for each image and block. image: its
  // first channel of `number`.
  MMSOFTPOOL_INLINE void reach(
      const T* image, int64_t number, int64_t key, int64_t od, int64_t oh) {
    image_ = image;
    number_ = number;
    od_ = od;
    oh_ = oh;
    reached_.clear();
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      reached_.push_back(rows_.get(key, d, h, [&](float* row) INLINED {
        for (int64_t c = 0; c < number; c += S::lanes, row += vector_size_) {
          split(d, h, c, x_.data());
          make_row(row);
        }
      }));
    });
  }

  // Then chooses one of its vectors of channels.
  MMSOFTPOOL_INLINE void choose(int64_t c) {
    channel_ = c;
    chosen_ = c / S::lanes * vector_size_;
    const int64_t place = chosen_ + 2 * size + 2 * room_;
    Vec largest = S::splat(-std::numeric_limits<float>::max());
    for (const float* const row : reached_) {
      const Vec exponent = S::load(row + place);
      largest = exponent > largest ? exponent : largest;
    }
    for (size_t r = 0; r < reached_.size(); ++r) {
      const Vec difference = S::load(reached_[r] + place) - largest, lowest = S::splat(-200);
      S::store(lowest > difference ? lowest : difference, differences_.data() + r * S::lanes);
      S::store(Powers<S>::ratio(difference), ratios_.data() + r * S::lanes);
    }
  }

  // Of the rows that were reached: the difference of their reference to the largest of them, and 2
  // to its power.
  MMSOFTPOOL_INLINE Vec difference(size_t r) const {
    return S::load(differences_.data() + r * S::lanes);
  }
  MMSOFTPOOL_INLINE Vec ratio(size_t r) const { return S::load(ratios_.data() + r * S::lanes); }

  // The sums of windows, of powers and of products.
  MMSOFTPOOL_INLINE void sums(int64_t window, Vec& sum, Vec& product) const {
    sum = product = Vec{};
    const int64_t place = chosen_ + 2 * size + window;
    for (size_t r = 0; r < reached_.size(); ++r) {
      const Vec row_sum = S::load(reached_[r] + place);
      Vec row_product = S::load(reached_[r] + place + room_);
      if constexpr (Relative) {
        row_product += difference(r) * row_sum;
      }
      sum += ratio(r) * row_sum;
      product += ratio(r) * row_product;
    }
  }

  // Calls compute(window), which returns the wrong lanes, for the vectors of windows, and then
  // compute again and repair(taps, window) for those with a wrong one.
  template <typename ComputeWindows, typename Repair>
  MMSOFTPOOL_INLINE void for_each_window(ComputeWindows&& compute, Repair&& repair) {
    auto wrong = compute(0);
    for (int64_t i = S::lanes; i < windows; i += S::lanes) {
      wrong |= compute(i);
    }
    if (none_of(wrong)) {
      return;
    }
    split_taps();
    for (int64_t i = 0; i < windows; i += S::lanes) {
      if (!none_of(compute(i))) {
        repair(taps_, i);
      }
    }
  }

  // How many lanes of a vector of windows there are, which, and where the first lies in a row of
  // the output.
  MMSOFTPOOL_INLINE int64_t lanes(int64_t window) const {
    return std::min(S::lanes, Last ? number_ - channel_ : windows - window);
  }
  MMSOFTPOOL_INLINE typename S::Bits present(int64_t window) const {
    return Last ? ~typename S::Bits{} : S::first_lanes(windows - window);
  }
  MMSOFTPOOL_INLINE int64_t in_output(int64_t window) const {
    return channel_ + window / step * channels;
  }

  // For a vector of channels: powers and products of the columns.
  const float* row(int64_t key, int64_t d, int64_t h, int64_t c) {
    return rows_.find(key, d, h) + c / S::lanes * vector_size_;
  }

  const int64_t channels, vectors;  // vectors: of the channels of a block
  const SplitRow layout;
  const int64_t size, size_with_row, part;  // of a split row
  const int64_t windows;                    // numbers in a row of windows
  std::vector<int64_t> offsets;             // of the taps

 private:
  // A row of the input, for a vector of channels.
  MMSOFTPOOL_INLINE void split(int64_t d, int64_t h, int64_t c, float* to) const {
    const int64_t row = (d * pooling_.height.in + h) * pooling_.width.in;
    const T* const from = image_ + row * channels + c;
    if constexpr (Last) {
      const int64_t lanes = std::min(S::lanes, number_ - c);
      for (const auto& [place, column] : layout.columns) {
        S::store(S::load(from + column * channels, lanes), to + place * step);
      }
    } else {
      split_row<S>(layout, from, to);
    }
  }

  // Of all rows that were reached: the taps of the first window, those of the next behind them.
  MMSOFTPOOL_INLINE void split_taps() {
    copies_.assign(reached_.size() * size_with_row, -std::numeric_limits<float>::infinity());
    taps_.clear();
    float* copy = copies_.data();
    for_each_row(pooling_, od_, oh_, [&](int64_t d, int64_t h) INLINED {
      split(d, h, channel_, copy);
      for (const int64_t offset : offsets) {
        taps_.push_back(copy + offset);
      }
      copy += size_with_row;
    });
  }

  MMSOFTPOOL_INLINE void make_row(float* row) const {
    const float* const x = x_.data();
    // The last vector may overlap the one before.
    const auto for_each_vector = [&](auto&& visit) INLINED {
      for (int64_t i = 0; i < size; i += S::lanes) {
        visit(std::min(i, size - S::lanes));
      }
    };
    Vec max = S::splat(-std::numeric_limits<float>::infinity());
    for_each_vector([&](int64_t i) INLINED {
      const Vec v = S::load(x + i);
      max = v > max ? v : max;
    });
    if constexpr (!Last) {
      max = S::broadcast(S::reduce(max, [](auto a, auto b) INLINED { return a > b ? a : b; }));
    }
    const auto reference = powers_.reference(max);
    float *const powers = row, *const products = row + size;
    for_each_vector([&](int64_t i) INLINED {
      Vec power, product;
      powers_.template power<Relative>(reference, S::load(x + i), power, product);
      S::store(power, powers + i);
      S::store(product, products + i);
    });
    float *const sums = products + size, *const product_sums = sums + room_;
    for (int64_t i = 0; i < windows; i += S::lanes) {
      Vec sum{}, product{};
      for (const int64_t tap : offsets) {
        sum += S::load(powers + tap + i);
        product += S::load(products + tap + i);
      }
      S::store(sum, sums + i);
      S::store(product, product_sums + i);
    }
    S::store(reference.exponent, product_sums + room_);
  }

  const Pooling& pooling_;
  const Powers<S> powers_;
  const int64_t room_, vector_size_;  // room_: for `windows`, in whole vectors
  RowCache<float> rows_;
  Pointers<const float> reached_;
  std::vector<float> differences_, ratios_;  // a vector for each row that was reached
  std::vector<float> x_, copies_;
  Pointers<const float> taps_;
  // What was reached and chosen last.
  const T* image_ = nullptr;
  int64_t number_ = 0, od_ = 0, oh_ = 0, channel_ = 0, chosen_ = 0;
};

// Items are rows of outputs.
template <bool Last, typename S, typename T>
MMSOFTPOOL_INLINE void forward_rows(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const int64_t height = pooling.height.out, image_rows = pooling.depth.out * height;
  const int64_t block = Last ? 64 : 1;  // channels
  PowerRows<Last, false, S, T> rows(pooling, block, false);
  const int64_t channels = rows.channels;
  int64_t key = 0;
  for (int64_t first_row = begin; first_row < end;) {
    const int64_t n = first_row / image_rows, last_row = std::min(end, (n + 1) * image_rows);
    const T* const image = input + n * pooling.in_plane() * channels;
    for (int64_t channel = 0; channel < channels; channel += block, ++key) {
      const int64_t number = std::min(block, channels - channel);
      for (int64_t row = first_row; row < last_row; ++row) {
        rows.reach(image + channel, number, key, row % image_rows / height, row % height);
        T* const output_row = output + row * pooling.width.out * channels + channel;
        const auto store = [&](int64_t i, Vec y) INLINED {
          S::store(y, output_row + rows.in_output(i), rows.lanes(i));
        };
        for (int64_t c = 0; c < number; c += S::lanes) {
          rows.choose(c);
          rows.for_each_window(
              [&](int64_t i) INLINED {
                Vec sum, product;
                rows.sums(i, sum, product);
                store(i, product / sum);
                return S::is_below(sum, smallest_sum) & rows.present(i);
              },
              [&](const auto& taps, int64_t i) INLINED {
                window_outputs<0, S>(
                    OneVector(), taps.size(), exponents,
                    [&](int64_t t, int64_t) INLINED { return S::load(taps[t] + i); },
                    [&](int64_t, Vec y) INLINED { store(i, y); });
              });
        }
      }
    }
    first_row = last_row;
  }
}

// The gradients of a block of channels of an image, or of a plane.
template <bool Last, typename S, typename T>
class SharedGradients {
 public:
  using Vec = typename S::Vec;

  SharedGradients(const Pooling& pooling, int64_t block)
      : pooling_(pooling),
        exponents_(pooling),
        slope_(S::splat(pooling.gradient == Gradient::exact ? ln2 : 0.0f)),
        rows_(pooling, block, GradientRows<float>::keeps_slices(pooling)),
        vector_size_(2 * rows_.size + rows_.size_with_row),
        gradient_rows_(pooling, rows_.vectors * vector_size_),
        scratch_(pooling.taps() * S::lanes),
        spread_(2 * rows_.part),
        distances_(rows_.layout.phases.size()) {
    for (const int64_t offset : rows_.offsets) {
      distances_[offset / rows_.part].push_back(offset % rows_.part);
      before_ = std::max(before_, offset % rows_.part);
    }
    const Axis& width = pooling.width;
    first_ = width.padding / width.stride * step;
    const int64_t last = (width.in - 1 + width.padding) / width.stride + 1;
    last_ = std::min(last, rows_.layout.part - slack) * step;
    a_.resize(before_ + rows_.part + 2 * S::lanes);
    b_ = a_;
  }

  // Pointers to the first of `number` channels. key: one for each image and block.
  MMSOFTPOOL_INLINE void compute(
      int64_t key, const T* grad_output, const T* image, T* grad_image, int64_t number) {
    const int64_t row_size = pooling_.width.out * rows_.channels;
    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      rows_.reach(image, number, key, od, oh);
      sums_.clear();
      for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
        sums_.push_back(gradient_rows_.claim(key, d, h));
      });
      for (int64_t c = 0; c < number; c += S::lanes) {
        rows_.choose(c);
        share(grad_output + (od * pooling_.height.out + oh) * row_size, c);
        spread(c);
      }
    };
    const auto write_row = [&](int64_t d, int64_t h, float* sums) INLINED {
      const int64_t pixel = (d * pooling_.height.in + h) * pooling_.width.in;
      for (int64_t c = 0; c < number; c += S::lanes) {
        T* const row = grad_image + pixel * rows_.channels + c;
        if (sums != nullptr) {
          complete(rows_.row(key, d, h, c), sums + in_row(c));
        }
        write(sums != nullptr ? sums + in_row(c) + 2 * rows_.size : nullptr, row, number - c);
      }
    };
    gradient_rows_.for_each_output_row(key, add_row, write_row);
  }

 private:
  static constexpr int64_t step = PowerRows<Last, true, S, T>::step;
  static constexpr int64_t slack = PowerRows<Last, true, S, T>::slack;

  // In a row of gradient_rows_, for each vector of channels: the sums of a, of b, and the gradients
  // of windows that are computed in the general way.
  int64_t in_row(int64_t c) const { return c / S::lanes * vector_size_; }

  // The shares of a row of windows.
  MMSOFTPOOL_INLINE void share(const T* grad_row, int64_t c) {
    const auto grad = [&](int64_t i) INLINED {
      return S::load(grad_row + rows_.in_output(i), rows_.lanes(i));
    };
    const auto store = [&](int64_t i, Vec a, Vec b) INLINED {
      S::store(a, a_.data() + before_ + i);
      S::store(b, b_.data() + before_ + i);
    };
    rows_.for_each_window(
        [&](int64_t i) INLINED {
          Vec sum, product;
          rows_.sums(i, sum, product);
          const Shares<S> shares(sum, product, grad(i), pooling_.gradient);
          const auto present = rows_.present(i);
          store(i, S::masked(shares.a, present), S::masked(shares.b, present));
          return shares.are_wrong(sum) & present;
        },
        [&](const auto& taps, int64_t i) INLINED {
          store(i, Vec{}, Vec{});
          const int64_t columns = rows_.offsets.size();
          window_gradients<0, S>(
              OneVector(), taps.size(), exponents_, pooling_.gradient,
              [&](int64_t) INLINED { return grad(i); }, scratch_.data(),
              [&](int64_t t, int64_t) INLINED { return S::load(taps[t] + i); },
              [&](int64_t t, int64_t, Vec v) INLINED {
                float* const to = sums_[t / columns] + in_row(c) + 2 * rows_.size +
                                  rows_.offsets[t % columns] + i;
                S::store(S::load(to) + S::masked(v, rows_.present(i)), to);
              });
        });
  }

  // Adds the shares along the width, then to each row.
  MMSOFTPOOL_INLINE void spread(int64_t c) {
    float *const sum_a = spread_.data(), *const sum_b = sum_a + rows_.part;
    for (size_t p = 0; p < distances_.size(); ++p) {
      for (int64_t i = first_; i < last_; i += S::lanes) {
        Vec a{}, b{};
        for (const int64_t distance : distances_[p]) {
          a += S::load(a_.data() + before_ + i - distance);
          b += S::load(b_.data() + before_ + i - distance);
        }
        S::store(a, sum_a + i);
        S::store(b, sum_b + i);
      }
      for (size_t r = 0; r < sums_.size(); ++r) {
        const Vec ratio = rows_.ratio(r), difference = slope_ * rows_.difference(r);
        float* const row_a = sums_[r] + in_row(c) + p * rows_.part;
        float* const row_b = row_a + rows_.size;
        for (int64_t i = first_; i < last_; i += S::lanes) {
          const Vec b = S::load(sum_b + i);
          S::store(S::load(row_a + i) + ratio * (S::load(sum_a + i) + difference * b), row_a + i);
          S::store(S::load(row_b + i) + ratio * b, row_b + i);
        }
      }
    }
  }

  // The gradients of a row from its sums of a and of b, which are set back to 0.
  MMSOFTPOOL_INLINE void complete(const float* powers, float* sums) {
    const int64_t size = rows_.size;
    float* const gradient = sums + 2 * size;
    for (int64_t part = 0; part < size; part += rows_.part) {
      for (int64_t i = part + first_; i < part + last_; i += S::lanes) {
        const Vec v = Shares<S>::gradient(
            powers + i, powers + size + i, sums + i, sums + size + i, pooling_.gradient);
        S::store(S::load(gradient + i) + v, gradient + i);
        S::store(Vec{}, sums + i);
        S::store(Vec{}, sums + size + i);
      }
    }
  }

  // Writes the gradients of a row and sets them back to 0, or writes 0 without any.
  MMSOFTPOOL_INLINE void write(float* gradient, T* row, int64_t number) {
    const int64_t columns = pooling_.width.in;
    if constexpr (Last) {
      const int64_t lanes = std::min(S::lanes, number);
      for (int64_t w = 0; w < columns && (!gradient || rows_.layout.has_gaps()); ++w) {
        S::store(Vec{}, row + w * rows_.channels, lanes);
      }
      for (const auto& [place, column] : rows_.layout.columns) {
        if (gradient != nullptr) {
          S::store(S::load(gradient + place * step), row + column * rows_.channels, lanes);
        }
      }
    } else if (gradient != nullptr) {
      merge_row<S>(rows_.layout, gradient, row);
    } else {
      std::fill_n(row, columns, T{});
    }
    if (gradient != nullptr) {
      std::fill_n(gradient, rows_.size, 0.0f);
    }
  }

  const Pooling& pooling_;
  const Exponents<S> exponents_;
  const Vec slope_;
  PowerRows<Last, true, S, T> rows_;
  const int64_t vector_size_;
  GradientRows<float> gradient_rows_;
  Pointers<float> sums_;
  std::vector<float> scratch_;
  // The shares of a row of windows, with zeros around: as many before as a tap can be away. For
  // each part of a split row, how far its taps are from the window.
  std::vector<float> a_, b_, spread_;
  std::vector<std::vector<int64_t>> distances_;
  int64_t before_ = 0, first_, last_;  // the places of a part that hold columns
};

// Items are planes, or blocks of channels of one image.
template <bool Last, typename S, typename T>
MMSOFTPOOL_INLINE void backward_rows(
    const Pooling& pooling, int64_t block, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  SharedGradients<Last, S, T> gradients(pooling, block);
  const int64_t channels = Last ? pooling.channels : 1, blocks = (channels + block - 1) / block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, channel = item % blocks * block;
    const int64_t in = n * pooling.in_plane() * channels + channel;
    gradients.compute(
        item, grad_output + n * pooling.out_plane() * channels + channel, input + in,
        grad_input + in, std::min(block, channels - channel));
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  if (pooling.layout == Layout::channels_last) {
    forward_rows<true, S>(pooling, input, output, begin, end);
  } else {
    forward_rows<false, S>(pooling, input, output, begin, end);
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  if (pooling.layout == Layout::channels_last) {
    backward_rows<true, S>(pooling, channel_block, grad_output, input, grad_input, begin, end);
  } else {
    backward_rows<false, S>(pooling, 1, grad_output, input, grad_input, begin, end);
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(shared)

}  // namespace mmsoftpool::cpu
