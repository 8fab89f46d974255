// Contiguous tensors whose windows overlap: one exponential for every input, see powers.h. Sums
// over windows are taken along the width first, once for each row of the input, and then over rows.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "powers.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// The rows of the input as powers, and their sums along the width. Products are those of
// Powers::power.
template <bool Relative, typename S, typename T>
class PowerRows {
 public:
  using Vec = typename S::Vec;

  PowerRows(
      const Pooling& pooling, const SplitRow& layout, SplitInput<S, T>& split, bool whole_slices)
      : pooling_(pooling),
        layout_(layout),
        split_(split),
        powers_(pooling),
        room_((pooling.width.out + S::lanes - 1) / S::lanes * S::lanes),
        rows_(pooling, 2 * layout.size + 2 * room_ + 1, 0.0f, whole_slices) {
    reached_.reserve(pooling.depth.kernel_size * pooling.height.kernel_size);
    ratios_.reserve(reached_.capacity());
  }

  // A row: powers and products (both split), their sums for each window, the reference.
  float* row(int64_t d, int64_t h) { return rows_.row(d, h); }

  // Makes the rows that output row (od, oh) reaches.
  MMSOFTPOOL_INLINE void reach(const T* input, int64_t plane, int64_t od, int64_t oh) {
    reached_.clear();
    differences_.clear();
    ratios_.clear();
    float exponent = -std::numeric_limits<float>::max();
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      if (!rows_.contains(plane, d, h)) {
        make_row(split_.row(input, plane, d, h), rows_.claim(plane, d, h));
      }
      reached_.push_back(row(d, h));
      exponent = std::max(exponent, reference(reached_.back()));
    });
    for (const float* const row : reached_) {
      differences_.push_back(std::max(reference(row) - exponent, -200.0f));
      ratios_.push_back(std::ldexp(1.0f, static_cast<int>(differences_.back())));
    }
  }

  // The sums of windows ow and so on of that output row, of powers and of products.
  MMSOFTPOOL_INLINE void sums(int64_t ow, Vec& sum, Vec& product) const {
    sum = product = Vec{};
    for (size_t r = 0; r < reached_.size(); ++r) {
      const Vec ratio = S::broadcast(ratios_[r]);
      const float* const row = reached_[r] + 2 * layout_.size + ow;
      sum += ratio * S::load(row);
      Vec row_product = S::load(row + room_);
      if constexpr (Relative) {
        row_product += S::broadcast(differences_[r]) * S::load(row);
      }
      product += ratio * row_product;
    }
  }

  // Of the rows that were reached: the difference of their reference to the largest of them, and 2
  // to its power.
  const std::vector<float>& differences() const { return differences_; }
  const std::vector<float>& ratios() const { return ratios_; }

 private:
  float reference(const float* row) const { return row[2 * layout_.size + 2 * room_]; }

  MMSOFTPOOL_INLINE void make_row(const float* x, float* row) const {
    const int64_t size = layout_.size;
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
    const float largest = S::reduce(max, [](auto a, auto b) INLINED { return a > b ? a : b; });
    const auto reference = powers_.reference(S::broadcast(largest));
    float *const powers = row, *const products = row + size;
    for_each_vector([&](int64_t i) INLINED {
      Vec power, product;
      powers_.template power<Relative>(reference, S::load(x + i), power, product);
      S::store(power, powers + i);
      S::store(product, products + i);
    });
    float *const sums = products + size, *const product_sums = sums + room_;
    const auto& offsets = split_.offsets();
    for (int64_t ow = 0; ow < pooling_.width.out; ow += S::lanes) {
      Vec sum{}, product{};
      for (const int64_t tap : offsets) {
        sum += S::load(powers + tap + ow);
        product += S::load(products + tap + ow);
      }
      S::store(sum, sums + ow);
      S::store(product, product_sums + ow);
    }
    row[2 * size + 2 * room_] = reference.exponent[0];
  }

  const Pooling& pooling_;
  const SplitRow& layout_;
  SplitInput<S, T>& split_;
  const Powers<S> powers_;
  const int64_t room_;  // for the windows of a row, in whole vectors
  RowCache<float> rows_;
  Pointers<float> reached_;
  std::vector<float> differences_, ratios_;
};

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  PowerRows<false, S, T> rows(pooling, layout, split, false);
  const int64_t depth = pooling.depth.out, height = pooling.height.out, width = pooling.width.out;
  const auto present = [&](int64_t ow) INLINED { return S::first_lanes(width - ow); };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / height / depth, od = row / height % depth, oh = row % height;
    rows.reach(input, plane, od, oh);
    T* const output_row = output + row * width;
    const auto store = [&](int64_t ow, Vec y) INLINED {
      S::store(y, output_row + ow, std::min(S::lanes, width - ow));
    };
    // Stores outputs and returns which of them are wrong.
    const auto pool = [&](int64_t ow) INLINED {
      Vec sum, product;
      rows.sums(ow, sum, product);
      store(ow, product / sum);
      return S::is_below(sum, smallest_sum) & present(ow);
    };
    auto wrong = pool(0);
    for (int64_t ow = S::lanes; ow < width; ow += S::lanes) {
      wrong |= pool(ow);
    }
    if (none_of(wrong)) {
      continue;
    }
    const auto& taps = split.taps(input, plane, od, oh);
    for (int64_t ow = 0; ow < width; ow += S::lanes) {
      if (!none_of(pool(ow))) {
        window_outputs<0, S>(
            OneVector(), taps.size(), exponents,
            [&](int64_t t, int64_t) INLINED { return S::load(taps[t] + ow); },
            [&](int64_t, Vec y) INLINED { store(ow, y); });
      }
    }
  }
}

// Items are planes.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  using S = Simd<float, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  const bool whole_slices = GradientRows<float>::keeps_slices(pooling);
  PowerRows<true, S, T> rows(pooling, layout, split, whole_slices);
  // For each row of the input the sums of a, of b, and the gradients of windows that are computed
  // in the general way.
  GradientRows<float> gradient_rows(pooling, 3 * layout.size);
  Pointers<float> sums, grads;
  const int64_t width = pooling.width.out;
  const auto present = [&](int64_t ow) INLINED { return S::first_lanes(width - ow); };
  const float slope = pooling.gradient == Gradient::exact ? ln2 : 0.0f;
  std::vector<float> scratch(pooling.taps() * S::lanes);
  // The shares of a row of windows with zeros around, as many before them as a tap can be away.
  const int64_t before = layout.offset_in_part(pooling.width.kernel_size - 1);
  std::vector<float> a(before + layout.part + 2 * S::lanes), b(a.size());
  // For each part of a split row, how far its taps are from the window.
  std::vector<std::vector<int64_t>> distances(layout.phases.size());
  for (int64_t k = 0; k < pooling.width.kernel_size; ++k) {
    distances[layout.offset(k) / layout.part].push_back(layout.offset(k) % layout.part);
  }

  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const grad_plane = grad_output + plane * pooling.out_plane();
    T* const grad_input_plane = grad_input + plane * pooling.in_plane();
    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      rows.reach(input, plane, od, oh);
      sums.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
        sums.push_back(gradient_rows.claim(plane, d, h));
      });
      const T* const grad_row = grad_plane + (od * pooling.height.out + oh) * width;
      const auto grad = [&](int64_t ow) INLINED {
        return S::load(grad_row + ow, std::min(S::lanes, width - ow));
      };
      const auto share = [&](int64_t ow) INLINED {
        Vec sum, product;
        rows.sums(ow, sum, product);
        const Shares<S> shares(sum, product, grad(ow), pooling.gradient);
        S::store(S::masked(shares.a, present(ow)), a.data() + before + ow);
        S::store(S::masked(shares.b, present(ow)), b.data() + before + ow);
        return shares.are_wrong(sum) & present(ow);
      };
      auto wrong = share(0);
      for (int64_t ow = S::lanes; ow < width; ow += S::lanes) {
        wrong |= share(ow);
      }
      if (!none_of(wrong)) {
        const auto& taps = split.taps(input, plane, od, oh);
        grads.clear();
        for (float* const row : sums) {
          for (const int64_t offset : split.offsets()) {
            grads.push_back(row + 2 * layout.size + offset);
          }
        }
        for (int64_t ow = 0; ow < width; ow += S::lanes) {
          if (none_of(share(ow))) {
            continue;
          }
          S::store(Vec{}, a.data() + before + ow);
          S::store(Vec{}, b.data() + before + ow);
          window_gradients<0, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) INLINED { return grad(ow); }, scratch.data(),
              [&](int64_t t, int64_t) INLINED { return S::load(taps[t] + ow); },
              [&](int64_t t, int64_t, Vec v) INLINED {
                S::store(S::load(grads[t] + ow) + S::masked(v, present(ow)), grads[t] + ow);
              });
        }
      }
      // Along the width, then to each row.
      for (size_t part = 0; part < distances.size(); ++part) {
        for (int64_t i = 0; i < layout.part - S::lanes; i += S::lanes) {
          Vec sum_a{}, sum_b{};
          for (const int64_t distance : distances[part]) {
            sum_a += S::load(a.data() + before + i - distance);
            sum_b += S::load(b.data() + before + i - distance);
          }
          for (size_t r = 0; r < sums.size(); ++r) {
            const Vec ratio = S::broadcast(rows.ratios()[r]);
            const Vec difference = S::broadcast(slope * rows.differences()[r]);
            float* const to = sums[r] + part * layout.part + i;
            S::store(S::load(to) + ratio * (sum_a + difference * sum_b), to);
            S::store(S::load(to + layout.size) + ratio * sum_b, to + layout.size);
          }
        }
      }
    };
    const auto write_row = [&](int64_t d, int64_t h, float* sum) INLINED {
      T* const row = grad_input_plane + (d * pooling.height.in + h) * pooling.width.in;
      if (sum == nullptr) {
        return std::fill_n(row, pooling.width.in, T{}), void();
      }
      const float* const powers = rows.row(d, h);
      float *const b_sum = sum + layout.size, *const gradient = b_sum + layout.size;
      for (int64_t part = 0; part < layout.size; part += layout.part) {
        for (int64_t i = part; i < part + layout.part - S::lanes; i += S::lanes) {
          const Vec v = Shares<S>::gradient(
              powers + i, powers + layout.size + i, sum + i, b_sum + i, pooling.gradient);
          S::store(S::load(gradient + i) + v, gradient + i);
          S::store(Vec{}, sum + i);
          S::store(Vec{}, b_sum + i);
        }
      }
      merge_row<S>(layout, gradient, row);
    };
    gradient_rows.for_each_output_row(plane, add_row, write_row);
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(contiguous_shared)

}  // namespace mmsoftpool::cpu
