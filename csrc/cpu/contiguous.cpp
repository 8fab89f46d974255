// Contiguous tensors: a vector holds neighbouring windows of a row.
#include <algorithm>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "rows.h"
#include "softmax.h"
#include "split_rows.h"

namespace mmsoftpool::cpu {
namespace {

// A pooling whose rows of the input are blocks of rows that follow each other in the tensor, with
// what `pieces` rows of outputs reach: small maps have short rows. Only for windows that tile the
// map; others have one piece.
struct RowBlocks {
  RowBlocks(const Pooling& original, int64_t pieces)
      : pooling(original),
        tiled(tile_the_map(original)),
        pieces(pieces),
        windows(original.width.out) {
    if (!tiled) {
      return;
    }
    window_rows = original.height.kernel_size;
    pooling.height = Axis();
    if (original.depth.kernel_size == 1) {  // every block is a plane
      pooling.batch = 1;
      pooling.channels = number(original) / pieces;
      pooling.depth = Axis();
    } else {
      pooling.height.in = pooling.height.out = number(original) / pieces;
    }
    pooling.width.in *= pieces * window_rows;
    pooling.width.out *= pieces * window_rows;
    pooling.width.stride = pooling.width.kernel_size;
  }

  // Of the rows of outputs that may be in a block: all, or those of a slice.
  static int64_t number(const Pooling& pooling) {
    const int64_t height = pooling.height.out;
    return pooling.depth.kernel_size == 1 ? pooling.planes() * pooling.depth.out * height : height;
  }
  // As many as leave what they reach in the first cache.
  static int64_t most_pieces(const Pooling& pooling) {
    if (!tile_the_map(pooling)) {
      return 1;
    }
    const int64_t taps = pooling.depth.kernel_size * pooling.height.kernel_size * pooling.width.in;
    int64_t pieces = std::clamp<int64_t>(2048 / taps, 1, number(pooling));
    while (number(pooling) % pieces != 0) {
      --pieces;
    }
    return pieces;
  }

  // Calls visit(window, place, n) for vectors of n windows of a row of the pooling, and where in
  // its split rows the first tap of the first one is. With last_first the last vector of a row of
  // outputs comes first: what it stores beyond its windows is overwritten, where windows tile the
  // map. Its taps are the last to be split, and quicker to load later.
  template <typename S, bool last_first, typename Visit>
  MMSOFTPOOL_INLINE void for_each_vector(Visit&& visit) const {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t window = piece * windows, place = window * window_rows;
      const int64_t whole = windows / S::lanes * S::lanes;
      if (last_first && whole < windows) {
        visit(window + whole, place + whole, windows - whole);
      }
      for (int64_t i = 0; i < whole; i += S::lanes) {
        visit(window + i, place + i, typename S::All());
      }
      if (!last_first && whole < windows) {
        visit(window + whole, place + whole, windows - whole);
      }
    }
  }

  Pooling pooling;
  bool tiled;
  int64_t pieces, windows;  // windows: in a row of outputs
  int64_t window_rows = 1;  // rows of a window that are in a block
};

// Calls visit(blocks, begin, end) for parts of the rows of outputs [begin, end): those of whole
// blocks, and those before and behind.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_part(
    const Pooling& pooling, int64_t begin, int64_t end, Visit&& visit) {
  const int64_t pieces = RowBlocks::most_pieces(pooling);
  const int64_t first = std::min((begin + pieces - 1) / pieces * pieces, end);
  const int64_t last = std::max(end / pieces * pieces, first);
  const struct {
    int64_t begin, end, pieces;
  } parts[] = {{begin, first, 1}, {first, last, pieces}, {last, end, 1}};
  for (const auto& part : parts) {
    if (part.begin < part.end) {
      visit(RowBlocks(pooling, part.pieces), part.begin / part.pieces, part.end / part.pieces);
    }
  }
}

// The split rows of the input, and where the taps of a row of windows are in them.
template <typename S, typename T>
class SplitInput {
 public:
  using A = Compute<T>;

  SplitInput(const RowBlocks& blocks, const SplitRow& layout)
      : pooling_(blocks.pooling),
        layout_(layout),
        rows_(pooling_, layout.size_with_row(), -std::numeric_limits<A>::infinity(), false) {
    for (int64_t h = 0; h < blocks.window_rows; ++h) {
      for (int64_t k = 0; k < layout.width.kernel_size; ++k) {
        offsets_.push_back(h * blocks.windows + layout.offset(k));
      }
    }
    taps_.reserve(blocks.window_rows * pooling_.taps());
  }

  // The taps of the first window of row (od, oh); those of the next window follow them.
  MMSOFTPOOL_INLINE const Pointers<const A>& taps(
      const T* input, int64_t plane, int64_t od, int64_t oh) {
    taps_.clear();
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      const A* const row = rows_.get(plane, d, h, [&](A* split) INLINED {
        const int64_t number = (plane * pooling_.depth.in + d) * pooling_.height.in + h;
        split_row<S>(layout_, input + number * pooling_.width.in, split);
      });
      for (const int64_t offset : offsets_) {
        taps_.push_back(row + offset);
      }
    });
    return taps_;
  }

  const std::vector<int64_t>& offsets() const { return offsets_; }

 private:
  const Pooling& pooling_;
  const SplitRow& layout_;
  RowCache<A> rows_;
  std::vector<int64_t> offsets_;
  Pointers<const A> taps_;
};

// Items are rows of outputs.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const Exponents<S> exponents(pooling);
  const auto pool = [&](const RowBlocks& blocks, int64_t begin, int64_t end) INLINED {
    const SplitRow layout(blocks.pooling.width, S::lanes);
    SplitInput<S, T> split(blocks, layout);
    const auto pool_row = [&](int64_t row, int64_t plane, int64_t od, int64_t oh) INLINED {
      const auto& taps = split.taps(input, plane, od, oh);
      const auto* const* const tap = taps.data();
      T* const y = output + row * blocks.pieces * blocks.windows;
      with_taps(taps.size(), [&](auto constant) INLINED {
        blocks.for_each_vector<S, false>([&](int64_t window, int64_t place, auto n) INLINED {
          window_outputs<constant.value, S>(
              OneVector(), taps.size(), exponents,
              [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + place); },
              [&](int64_t, auto v) INLINED { S::store(v, y + window, n); });
        });
      });
    };
    for_each_output_row(blocks.pooling, begin, end, pool_row);
  };
  for_each_part(pooling, begin, end, pool);
}

// Items are planes.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  const Exponents<S> exponents(pooling);
  const T* const grad_end = grad_output + end * pooling.out_plane();
  const auto pool = [&](const RowBlocks& blocks, int64_t begin, int64_t end) INLINED {
    const SplitRow layout(blocks.pooling.width, S::lanes);
    SplitInput<S, T> split(blocks, layout);
    GradientRows<A> gradient_rows(blocks.pooling, layout.size_with_row());
    Pointers<A> grads;  // as the taps, in gradient_rows
    grads.reserve(pooling.taps());
    std::vector<A> scratch(pooling.taps() * S::lanes);
    const int64_t height = blocks.pooling.height.out, rows = blocks.pooling.depth.out * height;
    int64_t plane = begin / rows;

    const auto add_row = [&](int64_t od, int64_t oh) INLINED {
      const auto& taps = split.taps(input, plane, od, oh);
      grads.clear();
      for_each_row(blocks.pooling, od, oh, [&](int64_t d, int64_t h) INLINED {
        A* const row = gradient_rows.claim(plane, d, h);
        for (const int64_t offset : split.offsets()) {
          grads.push_back(row + offset);
        }
      });
      const int64_t row = plane * rows + od * height + oh;
      const T* const grad_y = grad_output + row * blocks.pieces * blocks.windows;
      const A* const* const tap = taps.data();
      A* const* const grad = grads.data();
      const auto pool_vectors = [&](auto constant, auto tiled) INLINED {
        blocks.for_each_vector<S, tiled>([&](int64_t window, int64_t place, auto n) INLINED {
          const auto live = S::first_lanes(n);
          window_gradients<constant.value, S>(
              OneVector(), taps.size(), exponents, pooling.gradient,
              [&](int64_t) INLINED {
                return S::load(grad_y + window, std::min(S::lanes, grad_end - grad_y - window));
              },
              scratch.data(), [&](int64_t t, int64_t) INLINED { return S::load(tap[t] + place); },
              [&](int64_t t, int64_t, Vec v) INLINED {
                A* const to = grad[t] + place;
                if constexpr (tiled.value) {
                  S::store(v, to);
                } else {
                  // The lanes beyond may hold columns of real windows, or a NaN.
                  constexpr bool all = std::is_same_v<decltype(n), typename S::All>;
                  S::store(S::load(to) + (all ? v : S::masked(v, live)), to);
                }
              });
        });
      };
      with_taps(taps.size(), [&](auto constant) INLINED {
        if (blocks.tiled) {
          pool_vectors(constant, std::true_type());
        } else {
          pool_vectors(constant, std::false_type());
        }
      });
    };
    const auto write_row = [&](int64_t d, int64_t h, A* sums) INLINED {
      const Axis &depth = blocks.pooling.depth, &height = blocks.pooling.height;
      const int64_t row = (plane * depth.in + d) * height.in + h;
      T* const grad_x = grad_input + row * layout.width.in;
      if (sums != nullptr) {
        merge_row<S>(layout, sums, grad_x);
        std::fill_n(sums, blocks.tiled ? 0 : layout.size, A(0));
      } else {
        std::fill_n(grad_x, layout.width.in, T{});
      }
    };
    for (; plane < end / rows; ++plane) {
      gradient_rows.for_each_output_row(plane, add_row, write_row);
    }
  };
  const int64_t rows = pooling.depth.out * pooling.height.out;
  for_each_part(pooling, begin * rows, end * rows, pool);
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(contiguous)
MMSOFTPOOL_INSTANTIATE_KERNEL(contiguous, double)

}  // namespace mmsoftpool::cpu
