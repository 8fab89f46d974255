// Adaptive pooling. A map has few windows, of different sizes, so a vector holds a tap of many
// planes: of neighbouring channels where the tensor is channels last, else of planes that are
// copied side by side, a part of the map at a time, and back.
#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "softmax.h"

namespace mmsoftpool::cpu {
namespace {

constexpr int64_t block = planes_side_by_side;

// The windows of an axis, without a division for each.
struct Windows {
  explicit Windows(const Axis& axis) : begin(axis.out), end(axis.out) {
    for (int64_t o = 0; o < axis.out; ++o) {
      begin[o] = axis.first_input(o);
      end[o] = begin[o] + axis.taps(o);
    }
  }
  int64_t end_before(int64_t o) const { return o > 0 ? end[o - 1] : 0; }

  std::vector<int64_t> begin, end;
};

// A part of a map: as many slices, which are rows or, in 3d, whole slices, as one row of windows
// reaches, or all of a small map. Slice i is at i modulo their number.
struct Ring {
  explicit Ring(const Pooling& pooling)
      : by_depth(pooling.depth.in * pooling.depth.out > 1),
        outer(by_depth ? pooling.depth : pooling.height),
        slice((by_depth ? pooling.height.in : 1) * pooling.width.in),
        width(pooling.width.in),
        rows(pooling.height.out),
        slices(pooling.in_plane() <= 1 << 12 ? outer.in : outer.kernel_size) {}

  int64_t size() const { return slices * slice; }
  int64_t row(int64_t d, int64_t h) const {
    return by_depth ? d % slices * slice + h * width : h % slices * slice;
  }
  // Calls copy(position in the map, in the ring, positions) for the slices [begin, end).
  template <typename Copy>
  MMSOFTPOOL_INLINE void for_each_run(int64_t begin, int64_t end, Copy&& copy) const {
    for (int64_t i = begin; i < end;) {
      const int64_t n = std::min(end - i, slices - i % slices);
      copy(i * slice, i % slices * slice, n * slice);
      i += n;
    }
  }

  bool by_depth;
  const Axis& outer;
  int64_t slice, width, rows, slices;
};

// Lanes First, First + 1 ... of a and of b in turn.
template <typename S, int64_t First, size_t... I>
MMSOFTPOOL_INLINE typename S::Vec interleave(
    typename S::Vec a, typename S::Vec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * S::lanes)...);
#else
  using Integer = typename S::Integer;
  return __builtin_shuffle(a, b, typename S::Bits{Integer(First + I / 2 + I % 2 * S::lanes)...});
#endif
}

// Lane j of vector i becomes lane i of vector j.
template <typename S>
MMSOFTPOOL_INLINE void transpose(typename S::Vec* v) {
  constexpr auto lanes = std::make_index_sequence<S::lanes>();
#pragma GCC unroll 4
  for (int64_t step = 1; step < S::lanes; step *= 2) {
    typename S::Vec next[S::lanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < S::lanes / 2; ++i) {
      next[2 * i] = interleave<S, 0>(v[i], v[i + S::lanes / 2], lanes);
      next[2 * i + 1] = interleave<S, S::lanes / 2>(v[i], v[i + S::lanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < S::lanes; ++i) {
      v[i] = next[i];
    }
  }
}

// Some planes of a tensor, at most a block.
template <typename T>
struct Planes {
  T* first;
  int64_t number;
  int64_t step;      // from a plane to the next
  int64_t position;  // from a number of a plane to the next
  T* end;            // of the tensor

  // In whole vectors.
  template <typename S>
  int64_t lanes() const {
    return (number + S::lanes - 1) / S::lanes * S::lanes;
  }
};

// Calls copy(start, n) for `size` numbers, a vector at a time; the last one may overlap another.
template <typename S, typename Copy>
MMSOFTPOOL_INLINE void for_each_tile(int64_t size, Copy&& copy) {
  for (int64_t i = 0; i + S::lanes <= size; i += S::lanes) {
    copy(i, typename S::All());
  }
  if (size < S::lanes) {
    copy(int64_t(0), size);
  } else if (size % S::lanes != 0) {
    copy(size - S::lanes, typename S::All());
  }
}

// The planes' numbers [from, from + size) side by side; the last vector of planes is filled up.
template <typename S, typename T>
MMSOFTPOOL_INLINE void to_lanes(
    const Planes<const T>& planes, int64_t from, int64_t size, Compute<T>* to) {
  using Vec = typename S::Vec;
  for (int64_t p = 0; p < planes.number; p += S::lanes) {
    const T* const first = planes.first + p * planes.step + from * planes.position;
    if (planes.position != 1) {
      for (int64_t i = 0; i < size; ++i) {
        const T* const x = first + i * planes.position;
        const bool inside = x + S::lanes <= planes.end;
        S::store(
            inside ? S::load(x) : S::load_first(x, std::min(S::lanes, planes.number - p)),
            to + i * block + p);
      }
      continue;
    }
    const T* plane[S::lanes];  // the last one is repeated
    for (int64_t j = 0; j < S::lanes; ++j) {
      plane[j] = first + std::min(j, planes.number - 1 - p) * planes.step;
    }
    for_each_tile<S>(size, [&](int64_t start, auto n) INLINED {
      Vec v[S::lanes];
      for (int64_t j = 0; j < S::lanes; ++j) {
        v[j] = S::load(plane[j] + start, n);
      }
      transpose<S>(v);
      for (int64_t j = 0; j < n; ++j) {
        S::store(v[j], to + (start + j) * block + p);
      }
    });
  }
}

template <typename S, typename T>
MMSOFTPOOL_INLINE void from_lanes(
    const Compute<T>* from, int64_t to, int64_t size, const Planes<T>& planes) {
  using Vec = typename S::Vec;
  for (int64_t p = 0; p < planes.number; p += S::lanes) {
    T* const first = planes.first + p * planes.step + to * planes.position;
    const int64_t number = std::min(S::lanes, planes.number - p);
    if (planes.position != 1) {
      for (int64_t i = 0; i < size; ++i) {
        S::store(S::load(from + i * block + p), first + i * planes.position, number);
      }
      continue;
    }
    for_each_tile<S>(size, [&](int64_t start, auto n) INLINED {
      Vec v[S::lanes] = {};
      for (int64_t j = 0; j < n; ++j) {
        v[j] = S::load(from + (start + j) * block + p);
      }
      transpose<S>(v);
      if (number == S::lanes) {
        for (int64_t j = 0; j < S::lanes; ++j) {
          S::store(v[j], first + j * planes.step + start, n);
        }
        return;
      }
      for (int64_t j = 0; j < number; ++j) {
        S::store(v[j], first + j * planes.step + start, n);
      }
    });
  }
}

int64_t blocks_of_image(const Pooling& pooling) { return (pooling.channels + block - 1) / block; }

// The planes of block b.
template <typename T>
Planes<T> block_of(const Pooling& pooling, T* tensor, int64_t plane_size, int64_t b) {
  T* const end = tensor + pooling.planes() * plane_size;
  if (pooling.layout == Layout::contiguous) {
    return {
        tensor + b * block * plane_size, std::min(block, pooling.planes() - b * block), plane_size,
        1, end};
  }
  const int64_t blocks = blocks_of_image(pooling), c = b % blocks * block;
  return {
      tensor + b / blocks * plane_size * pooling.channels + c,
      std::min(block, pooling.channels - c), 1, pooling.channels, end};
}

// What the rows of windows need.
template <typename S>
class Rows {
 public:
  using A = typename S::Scalar;
  using Vec = typename S::Vec;

  MMSOFTPOOL_INLINE explicit Rows(const Pooling& pooling)
      : exponents_(pooling),
        gradient_(pooling.gradient),
        depth(pooling.depth),
        height(pooling.height),
        width(pooling.width) {
    taps_.resize(pooling.taps());
  }

  // The outputs of the windows of row (od, oh). Position p of the map is at x + p * step, where
  // row(d, h) is the position of the first of a row.
  template <typename T, typename Row>
  MMSOFTPOOL_INLINE void forward(
      int64_t od, int64_t oh, const Row& row, const T* x, int64_t step, int64_t channels, T* y) {
    for (size_t ow = 0; ow < width.begin.size(); ++ow, y += step) {
      int64_t n = 0;
      for_each_row(od, oh, [&](int64_t d, int64_t h) INLINED {
        for (int64_t w = width.begin[ow], p = row(d, h) + w; w < width.end[ow]; ++w, ++p) {
          taps_[n++] = p * step;
        }
      });
      const int64_t* const tap = taps_.data();
      with_taps(n, [&](auto constant) INLINED {
        int64_t c = 0;
        for (; c + 2 * S::lanes <= channels; c += 2 * S::lanes) {
          Vec outputs[2];
          window_outputs<constant.value, S>(
              std::make_index_sequence<2>(), n, exponents_,
              [&](int64_t t, int64_t i) INLINED { return load<T>(x + tap[t] + c, i); },
              [&](int64_t i, Vec v) INLINED { outputs[i] = v; });
          if constexpr (std::is_same_v<T, BFloat16>) {
            S::store_pairs(outputs[0], outputs[1], y + c);
          } else {
            S::store(outputs[0], y + c);
            S::store(outputs[1], y + c + S::lanes);
          }
        }
        if (c < channels) {
          window_outputs<constant.value, S>(
              OneVector(), n, exponents_,
              [&](int64_t t, int64_t) INLINED { return S::load(x + tap[t] + c); },
              [&](int64_t, Vec v) INLINED { S::store(v, y + c); });
        }
      });
    }
  }

  // Adds the gradients of those windows to `sums`, which is as x, or sets those that no window
  // before has reached.
  template <typename Row>
  MMSOFTPOOL_INLINE void backward(
      int64_t od, int64_t oh, const Row& row, const A* x, int64_t step, int64_t channels,
      const A* grad_y, A* sums) {
    const auto is_new = [&](int64_t d, int64_t h) INLINED {
      return d >= depth.end_before(od) && h >= height.end_before(oh);
    };
    for (size_t ow = 0; ow < width.begin.size(); ++ow, grad_y += step) {
      // The taps that windows before have reached come first.
      const int64_t begin = width.begin[ow], end = width.end[ow];
      const int64_t first_new = std::clamp(width.end_before(ow), begin, end);
      int64_t n = 0;
      const auto add = [&](int64_t from, int64_t to) INLINED {
        for (; from < to; ++from) {
          taps_[n++] = from * step;
        }
      };
      for_each_row(od, oh, [&](int64_t d, int64_t h) INLINED {
        const int64_t start = row(d, h);
        add(start + begin, start + (is_new(d, h) ? first_new : end));
      });
      const int64_t reached = n;
      for_each_row(od, oh, [&](int64_t d, int64_t h) INLINED {
        if (is_new(d, h)) {
          add(row(d, h) + first_new, row(d, h) + end);
        }
      });
      before_.resize(std::max(before_.size(), size_t(reached * 2 * S::lanes)));
      with_taps(n, [&](auto constant) INLINED {
        int64_t c = 0;
        for (; c + 2 * S::lanes <= channels; c += 2 * S::lanes) {
          add_gradients<constant.value>(
              std::make_index_sequence<2>(), n, reached, x + c, grad_y + c, sums + c);
        }
        if (c < channels) {
          add_gradients<constant.value>(OneVector(), n, reached, x + c, grad_y + c, sums + c);
        }
      });
    }
  }

 private:
  // Vector i of two. Numbers of 16 bits at even and at odd places take fewer instructions than
  // neighbours.
  template <typename T>
  static MMSOFTPOOL_INLINE Vec load(const T* x, int64_t i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      Vec pair[2];
      S::load_pairs(x, pair[0], pair[1]);
      return pair[i];
    } else {
      return S::load(x + i * S::lanes);
    }
  }

  // A weight waits for the sum of all in the place of its gradient: windows may be large. What was
  // there before, in the first `reached` places, is kept beside.
  template <int K, size_t... I>
  MMSOFTPOOL_INLINE void add_gradients(
      std::index_sequence<I...>, int64_t taps, int64_t reached, const A* x, const A* grad_y,
      A* sums) {
    constexpr int64_t lanes = S::lanes, number = sizeof...(I);
    const int64_t n = K ? K : taps;
    const int64_t* const tap = taps_.data();
    A* const before = before_.data();
    Vec max[] = {(static_cast<void>(I), S::splat(-std::numeric_limits<A>::infinity()))...};
    for (int64_t t = 0; t < n; ++t) {
      const Vec v[] = {S::load(x + tap[t] + I * lanes)...};
      ((max[I] = v[I] > max[I] ? v[I] : max[I]), ...);  // ignores NaN
    }
    for (int64_t t = 0; t < reached; ++t) {
      std::copy_n(sums + tap[t], number * lanes, before + t * number * lanes);
    }
    Softmax<S> softmax[] = {{exponents_, max[I]}...};
    for (int64_t t = 0; t < n; ++t) {
      if constexpr (K == 0) {
        (softmax[I].carry_before(t), ...);
      }
      (S::store(softmax[I].add(S::load(x + tap[t] + I * lanes)), sums + tap[t] + I * lanes), ...);
    }
    if constexpr (K == 0) {
      (softmax[I].complete(n), ...);
    }
    const Vec scale[] = {softmax[I].scale(S::load(grad_y + I * lanes))...};
    const Vec offset[] = {softmax[I].offset()...};
    const auto gradient = [&](int64_t t, size_t i) INLINED {
      const Vec g = scale[i] * S::load(sums + tap[t] + i * lanes);
      return gradient_ == Gradient::paper
                 ? g
                 : g * softmax[i].slope(S::load(x + tap[t] + i * lanes), offset[i]);
    };
    for (int64_t t = 0; t < reached; ++t) {
      const A* const kept = before + t * number * lanes;
      (S::store(S::load(kept + I * lanes) + gradient(t, I), sums + tap[t] + I * lanes), ...);
    }
    for (int64_t t = reached; t < n; ++t) {
      (S::store(gradient(t, I), sums + tap[t] + I * lanes), ...);
    }
  }

  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_row(int64_t od, int64_t oh, Visit&& visit) const {
    for (int64_t d = depth.begin[od]; d < depth.end[od]; ++d) {
      for (int64_t h = height.begin[oh]; h < height.end[oh]; ++h) {
        visit(d, h);
      }
    }
  }

  Exponents<S> exponents_;
  Gradient gradient_;
  std::vector<int64_t> taps_;
  std::vector<A> before_;

 public:
  Windows depth, height, width;
};

// Of a row of windows: the slices that it reaches, or all that the ring holds, and the end of those
// that no later window does.
struct Needed {
  template <typename S>
  Needed(const Ring& ring, const Rows<S>& rows, int64_t od, int64_t oh) {
    const Windows& outer = ring.by_depth ? rows.depth : rows.height;
    const int64_t o = ring.by_depth ? od : oh, in = ring.outer.in;
    const bool all = ring.slices == in;
    begin = all ? 0 : outer.begin[o];
    end = all ? in : outer.end[o];
    const bool is_last = !ring.by_depth || oh + 1 == ring.rows;
    const int64_t next = is_last ? o + 1 : o;
    complete = next == ring.outer.out ? in : all ? 0 : outer.begin[next];
  }
  int64_t begin, end, complete;
};

// Items are rows of windows: of a block of planes or, channels last, of an image.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = FastSimd<T, Bytes>;
  Rows<S> rows(pooling);
  const Ring ring(pooling);
  const auto in_map = [&](int64_t d, int64_t h)
                          INLINED { return (d * pooling.height.in + h) * pooling.width.in; };
  const bool last = pooling.layout == Layout::channels_last;
  const int64_t channels = pooling.channels, whole = last ? channels / block * block : 0;
  const int64_t width = pooling.width.out, number = pooling.depth.out * pooling.height.out;
  std::unique_ptr<A[]> x;
  std::vector<A> y(width * block);
  int64_t held = -1, filled = 0;  // the block in x, and the end of its slices there
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / number, row = item % number;
    const int64_t od = row / pooling.height.out, oh = row % pooling.height.out;
    if (whole > 0) {
      rows.forward(
          od, oh, in_map, input + image * pooling.in_plane() * channels, channels, whole,
          output + item * width * channels);
    }
    if (last && whole == channels) {
      continue;
    }
    if (x == nullptr) {
      x.reset(new A[ring.size() * block]);
    }
    const int64_t b = last ? (image + 1) * blocks_of_image(pooling) - 1 : image;
    const Needed needed(ring, rows, od, oh);
    if (b != held) {
      held = b;
      filled = needed.begin;
    }
    const auto planes = block_of(pooling, input, pooling.in_plane(), b);
    ring.for_each_run(filled, needed.end, [&](int64_t from, int64_t to, int64_t size) INLINED {
      to_lanes<S>(planes, from, size, x.get() + to * block);
    });
    filled = needed.end;
    rows.forward(
        od, oh, [&](int64_t d, int64_t h) INLINED { return ring.row(d, h); }, x.get(), block,
        planes.template lanes<S>(), y.data());
    from_lanes<S>(y.data(), row * width, width, block_of(pooling, output, pooling.out_plane(), b));
  }
}

// Items are blocks of planes or, channels last, `channel_block` channels of an image.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using S = FastSimd<T, Bytes>;
  Rows<S> rows(pooling);
  const Ring ring(pooling);
  const auto in_map = [&](int64_t d, int64_t h)
                          INLINED { return (d * pooling.height.in + h) * pooling.width.in; };
  const int64_t width = pooling.width.out;
  std::unique_ptr<A[]> x, grad_x;
  std::vector<A> grad_y(width * block);
  const auto pool_block = [&](int64_t b) INLINED {
    if (x == nullptr) {
      x.reset(new A[ring.size() * block]);
      grad_x.reset(new A[ring.size() * block]);
    }
    const auto planes = block_of(pooling, input, pooling.in_plane(), b);
    const auto grad_planes = block_of(pooling, grad_input, pooling.in_plane(), b);
    const auto grad_outputs = block_of(pooling, grad_output, pooling.out_plane(), b);
    int64_t filled = 0, written = 0;  // slices
    for (int64_t od = 0; od < pooling.depth.out; ++od) {
      for (int64_t oh = 0; oh < pooling.height.out; ++oh) {
        const Needed needed(ring, rows, od, oh);
        ring.for_each_run(filled, needed.end, [&](int64_t from, int64_t to, int64_t size) INLINED {
          to_lanes<S>(planes, from, size, x.get() + to * block);
        });
        filled = needed.end;
        to_lanes<S>(grad_outputs, (od * pooling.height.out + oh) * width, width, grad_y.data());
        rows.backward(
            od, oh, [&](int64_t d, int64_t h) INLINED { return ring.row(d, h); }, x.get(), block,
            planes.template lanes<S>(), grad_y.data(), grad_x.get());
        ring.for_each_run(
            written, needed.complete, [&](int64_t to, int64_t from, int64_t size) INLINED {
              from_lanes<S>(grad_x.get() + from * block, to, size, grad_planes);
            });
        written = needed.complete;
      }
    }
  };
  if (pooling.layout == Layout::contiguous) {
    for (int64_t item = begin; item < end; ++item) {
      pool_block(item);
    }
    return;
  }
  const int64_t items = (pooling.channels + channel_block - 1) / channel_block;
  const int64_t channels = pooling.channels, blocks = blocks_of_image(pooling);
  for (int64_t item = begin; item < end;) {  // those of an image together
    const int64_t image = item / items, first = item % items * channel_block;
    const int64_t number = std::min(end - item, items - item % items);
    const int64_t last = std::min(first + number * channel_block, channels);
    int64_t c = first;
    item += number;
    if constexpr (std::is_same_v<T, A>) {  // gradients are summed where they belong
      c += (last - first) / block * block;
      const int64_t inputs = image * pooling.in_plane() * channels + first;
      const T* grad = grad_output + image * pooling.out_plane() * channels + first;
      for (int64_t row = 0; row < pooling.depth.out * pooling.height.out && c > first; ++row) {
        rows.backward(
            row / pooling.height.out, row % pooling.height.out, in_map, input + inputs, channels,
            c - first, grad, grad_input + inputs);
        grad += width * channels;
      }
    }
    for (; c < last; c += block) {
      pool_block(image * blocks + c / block);
    }
  }
}

}  // namespace

MMSOFTPOOL_DEFINE_KERNEL(adaptive)
MMSOFTPOOL_INSTANTIATE_KERNEL(adaptive, double)

}  // namespace mmsoftpool::cpu
