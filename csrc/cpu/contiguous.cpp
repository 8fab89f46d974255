// Contiguous tensors: a vector holds neighbouring windows of a row.
#include <algorithm>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "softmax.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// Whether the windows are disjoint and cover the map, as those of 2 x 2 at stride 2 do.
bool tile_the_map(const Pooling& pooling) {
  const auto tile = [](const Axis& axis) {
    return axis.out * axis.kernel_size == axis.in && axis.padding == 0 && axis.dilation == 1 &&
           !axis.adaptive && (axis.out == 1 || axis.stride == axis.kernel_size);
  };
  return tile(pooling.depth) && tile(pooling.height) && tile(pooling.width);
}

// Of such windows the rows of outputs have rows of the input to themselves. Several are worked on
// together, and what they reach is split as if it were one row: small maps have short rows.
template <typename S, typename T>
class RowBlocks {
 public:
  using A = Compute<T>;

  explicit RowBlocks(const Pooling& pooling)
      : pooling_(pooling),
        slice_rows_(pooling.height.out),
        in_row_(pooling.height.kernel_size * pooling.width.in),
        out_row_(pooling.height.kernel_size * pooling.width.out) {
    if (pooling.depth.kernel_size == 1) {  // all slices, and planes, are one
      slice_rows_ *= pooling.planes() * pooling.depth.out;
    }
  }

  // Calls visit(first row of outputs, number) for blocks of the rows [begin, end), once their taps
  // are split.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each(const T* input, int64_t begin, int64_t end, Visit&& visit) {
    constexpr int64_t most_numbers = 2048;  // they stay in the first cache
    const int64_t most = std::max<int64_t>(1, most_numbers / pooling_.depth.kernel_size / in_row_);
    for (int64_t row = begin, number; row < end; row += number) {
      number = std::min({most, end - row, slice_rows_ - row % slice_rows_});
      if (number != number_) {
        allocate(number);
      }
      for (int64_t k = 0; k < pooling_.depth.kernel_size; ++k) {
        split_row<S>(*layout_, input + first_input(row, k), taps_.data() + k * layout_->size);
      }
      visit(row, number);
    }
  }

  // Of the block's first row of outputs, as offsets; those of the next row are out_row() behind.
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t out_row() const { return out_row_; }
  const A* taps() const { return taps_.data(); }
  A* gradients() { return gradients_.data(); }

  MMSOFTPOOL_INLINE void write_gradients(int64_t row, T* grad_input) {
    for (int64_t k = 0; k < pooling_.depth.kernel_size; ++k) {
      merge_row<S>(
          *layout_, gradients_.data() + k * layout_->size, grad_input + first_input(row, k));
    }
  }

  // Calls visit(ow) for the vectors of windows of a row. The last comes first: what it stores
  // beyond the row is overwritten by the first of the next row of outputs, or of taps.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_vector(Visit&& visit) const {
    const int64_t last = (pooling_.width.out - 1) / S::lanes * S::lanes;
    visit(last);
    for (int64_t ow = 0; ow < last; ow += S::lanes) {
      visit(ow);
    }
  }

 private:
  int64_t first_input(int64_t row, int64_t k) const {
    const int64_t slice = row / slice_rows_, depth = slice * pooling_.depth.kernel_size + k;
    return depth * pooling_.height.in * pooling_.width.in + row % slice_rows_ * in_row_;
  }

  void allocate(int64_t number) {
    number_ = number;
    const int64_t taps = pooling_.width.kernel_size;
    Axis axis;
    axis.in = number * in_row_;
    axis.out = number * out_row_;
    axis.kernel_size = axis.stride = taps;
    layout_.emplace(axis, S::lanes);
    taps_.assign(pooling_.depth.kernel_size * layout_->size, A(0));
    gradients_.assign(taps_.size(), A(0));
    offsets_.clear();
    for (int64_t d = 0; d < pooling_.depth.kernel_size; ++d) {
      for (int64_t h = 0; h < pooling_.height.kernel_size; ++h) {
        for (int64_t k = 0; k < taps; ++k) {
          offsets_.push_back(d * layout_->size + h * pooling_.width.out + layout_->offset(k));
        }
      }
    }
  }

  const Pooling& pooling_;
  int64_t slice_rows_;        // rows of outputs that follow each other as their taps do
  int64_t in_row_, out_row_;  // numbers, and windows, of the taps of a row of outputs
  int64_t number_ = 0;        // of rows in a block
  std::optional<SplitRow> layout_;
  std::vector<int64_t> offsets_;
  std::vector<A> taps_, gradients_;
};

template <typename S, typename T>
MMSOFTPOOL_INLINE void forward_tiles(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  const Exponents<S> exponents(pooling);
  const int64_t width = pooling.width.out, size = end * width;
  RowBlocks<S, T> blocks(pooling);
  blocks.for_each(input, begin, end, [&](int64_t first, int64_t number) INLINED {
    const int64_t* const offset = blocks.offsets().data();
    with_taps(pooling.taps(), [&](auto constant) INLINED {
      for (int64_t r = 0; r < number; ++r) {
        const auto* const x = blocks.taps() + r * blocks.out_row();
        blocks.for_each_vector([&](int64_t ow) INLINED {
          const int64_t y = (first + r) * width + ow;
          window_outputs<constant.value, S>(
              OneVector(), pooling.taps(), exponents,
              [&](int64_t t, int64_t) INLINED { return S::load(x + offset[t] + ow); },
              [&](int64_t, auto v)
                  INLINED { S::store(v, output + y, std::min(S::lanes, size - y)); });
        });
      }
    });
  });
}

template <typename S, typename T>
MMSOFTPOOL_INLINE void backward_tiles(
    const Pooling& pooling, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  const Exponents<S> exponents(pooling);
  const int64_t width = pooling.width.out, size = end * width;
  std::vector<Compute<T>> scratch(pooling.taps() * S::lanes);
  RowBlocks<S, T> blocks(pooling);
  blocks.for_each(input, begin, end, [&](int64_t first, int64_t number) INLINED {
    const int64_t* const offset = blocks.offsets().data();
    with_taps(pooling.taps(), [&](auto constant) INLINED {
      for (int64_t r = 0; r < number; ++r) {
        const auto* const x = blocks.taps() + r * blocks.out_row();
        auto* const grad_x = blocks.gradients() + r * blocks.out_row();
        blocks.for_each_vector([&](int64_t ow) INLINED {
          const int64_t y = (first + r) * width + ow;
          window_gradients<constant.value, S>(
              OneVector(), pooling.taps(), exponents, pooling.gradient,
              [&](int64_t)
                  INLINED { return S::load(grad_output + y, std::min(S::lanes, size - y)); },
              scratch.data(),
              [&](int64_t t, int64_t) INLINED { return S::load(x + offset[t] + ow); },
              [&](int64_t t, int64_t, auto v) INLINED { S::store(v, grad_x + offset[t] + ow); });
        });
      }
    });
    blocks.write_gradients(first, grad_input);
  });
}

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  if (tile_the_map(pooling)) {
    return forward_tiles<S>(pooling, input, output, begin, end);
  }
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  const int64_t width = pooling.width.out;
  for_each_output_row(
      pooling, begin, end, [&](int64_t row, int64_t plane, int64_t od, int64_t oh) INLINED {
        const auto& taps = split.taps(input, plane, od, oh);
        const auto* const* const tap = taps.data();
        T* const output_row = output + row * width;
        with_taps(taps.size(), [&](auto constant) INLINED {
          for (int64_t ow = 0; ow < width; ow += S::lanes) {
            window_outputs<constant.value, S>(
                OneVector(), taps.size(), exponents,
                [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + ow); },
                [&](int64_t, auto y)
                    INLINED { S::store(y, output_row + ow, std::min(S::lanes, width - ow)); });
          }
        });
      });
}

// Items are planes.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  if (tile_the_map(pooling)) {
    const int64_t rows = pooling.depth.out * pooling.height.out;
    return backward_tiles<S>(pooling, grad_output, input, grad_input, begin * rows, end * rows);
  }
  const Exponents<S> exponents(pooling);
  const SplitRow layout(pooling.width, S::lanes);
  SplitInput<S, T> split(pooling, layout);
  GradientRows<A> gradient_rows(pooling, layout.size);
  Pointers<A> grads;  // as the taps, in gradient_rows
  grads.reserve(pooling.taps());
  std::vector<A> scratch(pooling.taps() * S::lanes);
  const int64_t width = pooling.width.out;

  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const grad_plane = grad_output + plane * pooling.out_plane();
    T* const grad_input_plane = grad_input + plane * pooling.in_plane();
    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      const auto& taps = split.taps(input, plane, od, oh);
      grads.clear();
      for_each_row(pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
        A* const row = gradient_rows.claim(plane, d, h);
        for (const int64_t offset : split.offsets()) {
          grads.push_back(row + offset);
        }
      });
      const T* const grad_row = grad_plane + (od * pooling.height.out + oh) * width;
      with_taps(taps.size(), [&](auto constant) INLINED {
        const A* const* const tap = taps.data();
        A* const* const grad = grads.data();
        const auto add_gradients = [&](int64_t ow, auto n) INLINED {
          const auto live = S::first_lanes(n);
          window_gradients<constant.value, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) INLINED { return S::load(grad_row + ow, n); }, scratch.data(),
              [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + ow); },
              [&](int64_t t, int64_t, Vec v) INLINED {
                // The lanes beyond may hold columns of real windows, or a NaN.
                constexpr bool all = std::is_same_v<decltype(n), typename S::All>;
                S::store(S::load(grad[t] + ow) + (all ? v : S::masked(v, live)), grad[t] + ow);
              });
        };
        int64_t ow = 0;
        for (; ow + S::lanes <= width; ow += S::lanes) {
          add_gradients(ow, typename S::All());
        }
        if (ow < width) {
          add_gradients(ow, width - ow);
        }
      });
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) INLINED {
      T* const row = grad_input_plane + (d * pooling.height.in + h) * pooling.width.in;
      if (sums != nullptr) {
        merge_row<S>(layout, sums, row);
      } else {
        std::fill_n(row, pooling.width.in, T{});
      }
    };
    gradient_rows.for_each_output_row(plane, add_row, write_row);
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(contiguous)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, double)

}  // namespace mmsoftpool::cpu
