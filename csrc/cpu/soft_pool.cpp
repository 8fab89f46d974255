#include "soft_pool.h"

#include <algorithm>
#include <vector>

namespace mmsoftpool::cpu {
namespace {

// One scheme for all: every tap of a row of windows is a contiguous run of numbers somewhere, so
// that the inner loops are plain vector loads.
//
// - Channels last, a run is the channels of one pixel, and it lies in the tensor itself.
// - Contiguous, a run is a row of neighbouring windows. Rows are copied once into a small cache,
//   converted to the type computed with, framed by -inf for what is absent, and split by column
//   modulo the stride: tap k of all windows of the row is then contiguous.
//
// The backward adds into rows of the same form, in the type computed with, and writes a row to
// grad_input when no window to come reaches it. No atomics; always the same order of additions.

template <typename T>
using Pointers = std::vector<T*>;

// Calls visit(d, h) for the rows of the input that the windows of output row (od, oh) reach.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_row(const Geometry& g, int64_t od, int64_t oh, Visit&& visit) {
  for (int64_t kd = 0; kd < g.depth.kernel; ++kd) {
    const int64_t d = g.depth.first_input(od) + kd * g.depth.dilation;
    for (int64_t kh = 0; kh < g.height.kernel; ++kh) {
      const int64_t h = g.height.first_input(oh) + kh * g.height.dilation;
      if (d >= 0 && d < g.depth.in && h >= 0 && h < g.height.in) {
        visit(d, h);
      }
    }
  }
}

template <typename S>
MMSOFTPOOL_INLINE Exponents<S> make_exponents(const Geometry& g) {
  using A = typename S::Scalar;
  return Exponents<S>(Exponent<A>(g.alpha, g.taps(), exp_floor<A>));
}

// The largest tap of each window of a vector; NaN is passed over. K is the number of taps where it
// is known when compiling, else 0; load(t) gives tap t of the windows.
template <int K, typename S, typename Load>
MMSOFTPOOL_INLINE typename S::Vec largest(int64_t taps, Load&& load) {
  const int64_t n = K ? K : taps;
  typename S::Vec max = S::splat(-std::numeric_limits<typename S::Scalar>::infinity());
  for (int64_t t = 0; t < n; ++t) {
    const typename S::Vec x = load(t);
    max = x > max ? x : max;
  }
  return max;
}

// The outputs of one vector of windows.
template <int K, typename S, typename Load>
MMSOFTPOOL_INLINE typename S::Vec pool(int64_t taps, const Exponents<S>& exponents, Load&& load) {
  const int64_t n = K ? K : taps;
  Windows<S> windows(exponents, largest<K, S>(taps, load));
  for (int64_t t = 0; t < n; ++t) {
    windows.add(load(t));
  }
  return windows.output();
}

// Calls add(t, gradient of tap t) for one vector of windows. `scratch` has room
// for a vector per tap; where their number is known, registers do.
template <int K, typename S, typename Load, typename Add>
MMSOFTPOOL_INLINE void spread(
    int64_t taps, const Exponents<S>& exponents, Gradient gradient, typename S::Vec grad_output,
    typename S::Scalar* scratch, Load&& load, Add&& add) {
  using Vec = typename S::Vec;
  const int64_t n = K ? K : taps;
  Vec registers[K ? K : 1];
  const auto weight = [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA {
    return K ? registers[t] : S::load(scratch + t * S::lanes);
  };
  Windows<S> windows(exponents, largest<K, S>(taps, load));
  for (int64_t t = 0; t < n; ++t) {
    const Vec w = windows.add(load(t));
    if constexpr (K != 0) {
      registers[t] = w;
    } else {
      S::store(w, scratch + t * S::lanes);
    }
  }
  const Vec scale = windows.scale(grad_output);
  if (gradient == Gradient::paper) {
    for (int64_t t = 0; t < n; ++t) {
      add(t, scale * weight(t));
    }
    return;
  }
  const Vec offset = windows.offset();
  for (int64_t t = 0; t < n; ++t) {
    add(t, scale * weight(t) * windows.slope(load(t), offset));
  }
}

// Runs body(std::integral_constant<int, K>) with the number of taps as a constant for the windows
// that networks have.
template <typename Body>
MMSOFTPOOL_INLINE void with_taps(int64_t taps, Body&& body) {
  switch (taps) {
    case 4:
      return body(std::integral_constant<int, 4>());
    case 9:
      return body(std::integral_constant<int, 9>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// ---- contiguous ----------------------------------------------------------------------------

// A row of the input, split by column modulo the stride. Column c is at place p = c + pad; places
// p, p + stride, p + 2 stride ... are neighbours. `slack` elements at the end of each part may be
// read and written beyond the last window.
struct SplitRow {
  SplitRow(const Axis& axis, int64_t slack)
      : axis(axis),
        part(
            std::max((axis.out - 1) * axis.stride + axis.span() - 1, axis.in - 1 + axis.pad) /
                axis.stride +
            1 + slack),
        size(part * axis.stride) {}

  // Where tap k of the first window is; that of the next window follows it.
  int64_t offset(int64_t k) const {
    const int64_t place = k * axis.dilation;
    return place % axis.stride * part + place / axis.stride;
  }

  // Calls visit(first column, its place in the split row, number) for the columns of every part.
  template <typename Visit>
  MMSOFTPOOL_INLINE void for_each_run(Visit&& visit) const {
    for (int64_t phase = 0; phase < axis.stride; ++phase) {
      int64_t column = (phase - axis.pad) % axis.stride;
      column += column < 0 ? axis.stride : 0;
      if (column < axis.in) {
        const int64_t number = (axis.in - 1 - column) / axis.stride + 1;
        visit(column, phase * part + (column + axis.pad) / axis.stride, number);
      }
    }
  }

  const Axis& axis;
  int64_t part, size;
};

template <typename S, typename T>
MMSOFTPOOL_INLINE void split_row(const SplitRow& layout, const T* row, Compute<T>* split) {
  using A = Compute<T>;
  const int64_t stride = layout.axis.stride;
  layout.for_each_run([&](int64_t column, int64_t place, int64_t number) MMSOFTPOOL_INLINE_LAMBDA {
    A* const to = split + place;
    const T* const from = row + column;
    if constexpr (std::is_same_v<T, A>) {
      if (stride == 2) {  // a constant, which the compiler vectorises
        for (int64_t i = 0; i < number; ++i) {
          to[i] = from[2 * i];
        }
      } else {
        for (int64_t i = 0; i < number; ++i) {
          to[i] = from[stride * i];
        }
      }
    } else {
      T buffer[S::lanes];
      for (int64_t i = 0; i < number; i += S::lanes) {
        const int64_t n = std::min(S::lanes, number - i);
        for (int64_t j = 0; j < n; ++j) {
          buffer[j] = from[stride * (i + j)];
        }
        S::store_first(S::load(buffer), to + i, n);
      }
    }
  });
}

// Writes a row of gradients and sets its sums back to 0.
template <typename S, typename T>
MMSOFTPOOL_INLINE void merge_row(const SplitRow& layout, Compute<T>* split, T* row) {
  using A = Compute<T>;
  const int64_t stride = layout.axis.stride;
  layout.for_each_run([&](int64_t column, int64_t place, int64_t number) MMSOFTPOOL_INLINE_LAMBDA {
    const A* const from = split + place;
    T* const to = row + column;
    if constexpr (std::is_same_v<T, A>) {
      for (int64_t i = 0; i < number; ++i) {
        to[stride * i] = from[i];
      }
    } else {
      T buffer[S::lanes];
      for (int64_t i = 0; i < number; i += S::lanes) {
        const int64_t n = std::min(S::lanes, number - i);
        S::store(S::load_first(from + i, n), buffer);
        for (int64_t j = 0; j < n; ++j) {
          to[stride * (i + j)] = buffer[j];
        }
      }
    }
  });
  std::fill_n(split, layout.size, A(0));
}

// Rows of the form of SplitRow, each under the number of its row in the input. Rows that one window
// reaches never share a slot.
template <typename A>
class RowCache {
 public:
  RowCache(const Geometry& g, const SplitRow& layout, A fill, bool keep_all)
      : span_d_(keep_all ? g.depth.in : std::min(g.depth.span(), g.depth.in)),
        span_h_(keep_all ? g.height.in : std::min(g.height.span(), g.height.in)),
        size_(layout.size),
        tags_(span_d_ * span_h_, -1),
        rows_(span_d_ * span_h_ * size_, fill) {}

  int64_t& tag(int64_t d, int64_t h) { return tags_[slot(d, h)]; }
  A* row(int64_t d, int64_t h) { return rows_.data() + slot(d, h) * size_; }

 private:
  int64_t slot(int64_t d, int64_t h) const { return d % span_d_ * span_h_ + h % span_h_; }

  int64_t span_d_, span_h_, size_;
  std::vector<int64_t> tags_;
  std::vector<A> rows_;
};

// The input side, the same for forward and backward: finds or makes the rows that the windows of an
// output row reach and lists where their taps are.
template <typename S, typename T>
class Taps {
 public:
  using A = Compute<T>;

  Taps(const Geometry& g, const SplitRow& layout)
      : g_(g),
        layout_(layout),
        cache_(g, layout, -std::numeric_limits<A>::infinity(), false),
        offsets_(g.width.kernel) {
    for (int64_t k = 0; k < g.width.kernel; ++k) {
      offsets_[k] = layout.offset(k);
    }
    pointers_.reserve(g.taps());
  }

  MMSOFTPOOL_INLINE const Pointers<const A>& at(
      const T* input, int64_t plane, int64_t od, int64_t oh) {
    pointers_.clear();
    for_each_row(g_, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
      const int64_t number = (plane * g_.depth.in + d) * g_.height.in + h;
      A* const row = cache_.row(d, h);
      if (cache_.tag(d, h) != number) {
        cache_.tag(d, h) = number;
        split_row<S>(layout_, input + number * g_.width.in, row);
      }
      for (const int64_t offset : offsets_) {
        pointers_.push_back(row + offset);
      }
    });
    return pointers_;
  }

  const std::vector<int64_t>& offsets() const { return offsets_; }

 private:
  const Geometry& g_;
  const SplitRow& layout_;
  RowCache<A> cache_;
  std::vector<int64_t> offsets_;
  Pointers<const A> pointers_;
};

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward_contiguous(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const auto exponents = make_exponents<S>(g);
  const SplitRow layout(g.width, S::lanes);
  Taps<S, T> taps(g, layout);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % g.height.out;
    const int64_t od = row / g.height.out % g.depth.out;
    const auto& at = taps.at(input, row / (g.height.out * g.depth.out), od, oh);
    T* const out = output + row * g.width.out;
    with_taps(at.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
      const auto* const* const tap = at.data();
      int64_t ow = 0;
      const auto load = [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + ow); };
      for (; ow + S::lanes <= g.width.out; ow += S::lanes) {
        S::store(pool<constant.value, S>(at.size(), exponents, load), out + ow);
      }
      if (ow < g.width.out) {
        S::store_first(
            pool<constant.value, S>(at.size(), exponents, load), out + ow, g.width.out - ow);
      }
    });
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward_contiguous(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  const auto exponents = make_exponents<S>(g);
  const SplitRow layout(g.width, S::lanes);
  Taps<S, T> taps(g, layout);
  // Windows that overlap in depth come back to a row after the whole slice in between.
  const bool keep_all = g.depth.kernel > 1;
  RowCache<A> sums(g, layout, A(0), keep_all);
  Pointers<A> grads;
  grads.reserve(g.taps());
  std::vector<A> scratch(g.taps() * S::lanes);
  Vec lane{};
  for (int64_t i = 0; i < S::lanes; ++i) {
    lane[i] = A(i);
  }

  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t first_row = plane * g.depth.in * g.height.in;
    int64_t written = 0;  // rows of the plane that are in grad_input
    const auto write_until = [&](int64_t rows) MMSOFTPOOL_INLINE_LAMBDA {
      for (; written < rows; ++written) {
        const int64_t d = written / g.height.in, h = written % g.height.in;
        T* const to = grad_input + (first_row + written) * g.width.in;
        if (sums.tag(d, h) == first_row + written) {
          merge_row<S>(layout, sums.row(d, h), to);
        } else {
          std::fill_n(to, g.width.in, T{});  // no window reaches this row
        }
      }
    };
    for (int64_t od = 0; od < g.depth.out; ++od) {
      for (int64_t oh = 0; oh < g.height.out; ++oh) {
        if (!keep_all) {
          const int64_t h = std::clamp<int64_t>(g.height.first_input(oh), 0, g.height.in);
          write_until(g.depth.first_input(od) * g.height.in + h);
        }
        const auto& at = taps.at(input, plane, od, oh);
        grads.clear();
        for_each_row(g, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
          sums.tag(d, h) = first_row + d * g.height.in + h;
          for (const int64_t offset : taps.offsets()) {
            grads.push_back(sums.row(d, h) + offset);
          }
        });
        const T* const grad_row =
            grad_output + ((plane * g.depth.out + od) * g.height.out + oh) * g.width.out;
        with_taps(at.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
          const A* const* const tap = at.data();
          A* const* const grad = grads.data();
          int64_t ow = 0;
          const auto load = [&](int64_t t)
                                MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + ow); };
          for (; ow + S::lanes <= g.width.out; ow += S::lanes) {
            spread<constant.value, S>(
                at.size(), exponents, g.gradient, S::load(grad_row + ow), scratch.data(), load,
                [&](int64_t t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                  S::store(S::load(grad[t] + ow) + v, grad[t] + ow);
                });
          }
          if (const int64_t rest = g.width.out - ow; rest > 0) {
            // The lanes beyond may stand on columns of real windows, or on a NaN.
            const auto live = lane < S::splat(A(rest));
            spread<constant.value, S>(
                at.size(), exponents, g.gradient, S::load_first(grad_row + ow, rest),
                scratch.data(), load, [&](int64_t t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
                  S::store(S::load(grad[t] + ow) + (live ? v : Vec{}), grad[t] + ow);
                });
          }
        });
      }
    }
    write_until(g.depth.in * g.height.in);
  }
}

// ---- channels last -------------------------------------------------------------------------

// Calls visit(w) for the columns that window ow reaches.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_pixel(const Axis& axis, int64_t ow, Visit&& visit) {
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t w = axis.first_input(ow) + k * axis.dilation;
    if (w >= 0 && w < axis.in) {
      visit(w);
    }
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward_channels_last(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  using S = Simd<Compute<T>, Bytes>;
  const auto exponents = make_exponents<S>(g);
  Pointers<const T> rows, taps;
  rows.reserve(g.depth.kernel * g.height.kernel);
  taps.reserve(g.taps());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % g.height.out;
    const int64_t od = row / g.height.out % g.depth.out;
    const T* const image = input + row / (g.height.out * g.depth.out) * g.in_plane() * g.channels;
    rows.clear();
    for_each_row(g, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
      rows.push_back(image + (d * g.height.in + h) * g.width.in * g.channels);
    });
    for (int64_t ow = 0; ow < g.width.out; ++ow) {
      taps.clear();
      for (const T* const from : rows) {
        for_each_pixel(g.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
          taps.push_back(from + w * g.channels);
        });
      }
      T* const out = output + (row * g.width.out + ow) * g.channels;
      with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
        const T* const* const tap = taps.data();
        int64_t c = 0;
        for (; c + S::lanes <= g.channels; c += S::lanes) {
          S::store(
              pool<constant.value, S>(
                  taps.size(), exponents,
                  [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(tap[t] + c); }),
              out + c);
        }
        if (const int64_t rest = g.channels - c; rest > 0) {
          const auto load = [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA {
            return S::load_first(tap[t] + c, rest);
          };
          S::store_first(pool<0, S>(taps.size(), exponents, load), out + c, rest);
        }
      });
    }
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward_channels_last(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  using A = Compute<T>;
  using S = Simd<A, Bytes>;
  using Vec = typename S::Vec;
  const int64_t block_channels = g.channel_block;
  const int64_t blocks = (g.channels + block_channels - 1) / block_channels;
  const bool keep_all = g.depth.kernel > 1;
  // A row of sums: block_channels for each pixel. SplitRow's form is not needed here.
  Axis pixels;
  pixels.in = pixels.out = g.width.in * block_channels;
  const SplitRow layout(pixels, 0);
  RowCache<A> sums(g, layout, A(0), keep_all);
  const auto exponents = make_exponents<S>(g);
  Pointers<const T> rows, taps;
  Pointers<A> sum_rows, grads;
  std::vector<A> scratch(g.taps() * S::lanes);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks;
    const int64_t c0 = item % blocks * block_channels;
    const int64_t width = std::min(block_channels, g.channels - c0);
    const T* const image = input + n * g.in_plane() * g.channels + c0;
    T* const grad_image = grad_input + n * g.in_plane() * g.channels + c0;
    const int64_t first_row = item * g.depth.in * g.height.in;
    int64_t written = 0;
    const auto write_until = [&](int64_t end_row) MMSOFTPOOL_INLINE_LAMBDA {
      for (; written < end_row; ++written) {
        const int64_t d = written / g.height.in, h = written % g.height.in;
        T* const to = grad_image + written * g.width.in * g.channels;
        A* const from = sums.row(d, h);
        const bool reached = sums.tag(d, h) == first_row + written;
        for (int64_t w = 0; w < g.width.in; ++w) {
          for (int64_t c = 0; c < width; c += S::lanes) {
            A* const sum = from + w * block_channels + c;
            const Vec v = reached ? S::load(sum) : Vec{};
            if (width - c >= S::lanes) {
              S::store(v, to + w * g.channels + c);
            } else {
              S::store_first(v, to + w * g.channels + c, width - c);
            }
            if (reached) {
              S::store(Vec{}, sum);
            }
          }
        }
      }
    };
    for (int64_t od = 0; od < g.depth.out; ++od) {
      for (int64_t oh = 0; oh < g.height.out; ++oh) {
        if (!keep_all) {
          const int64_t h = std::clamp<int64_t>(g.height.first_input(oh), 0, g.height.in);
          write_until(g.depth.first_input(od) * g.height.in + h);
        }
        rows.clear();
        sum_rows.clear();
        for_each_row(g, od, oh, [&](int64_t d, int64_t h) MMSOFTPOOL_INLINE_LAMBDA {
          sums.tag(d, h) = first_row + d * g.height.in + h;
          rows.push_back(image + (d * g.height.in + h) * g.width.in * g.channels);
          sum_rows.push_back(sums.row(d, h));
        });
        const T* const grad_row =
            grad_output +
            (((n * g.depth.out + od) * g.height.out + oh) * g.width.out) * g.channels + c0;
        for (int64_t ow = 0; ow < g.width.out; ++ow) {
          taps.clear();
          grads.clear();
          for (size_t r = 0; r < rows.size(); ++r) {
            for_each_pixel(g.width, ow, [&](int64_t w) MMSOFTPOOL_INLINE_LAMBDA {
              taps.push_back(rows[r] + w * g.channels);
              grads.push_back(sum_rows[r] + w * block_channels);
            });
          }
          const T* const grad_pixel = grad_row + ow * g.channels;
          with_taps(taps.size(), [&](auto constant) MMSOFTPOOL_INLINE_LAMBDA {
            int64_t c = 0;
            const auto add = [&](int64_t t, Vec v) MMSOFTPOOL_INLINE_LAMBDA {
              S::store(S::load(grads[t] + c) + v, grads[t] + c);
            };
            for (; c + S::lanes <= width; c += S::lanes) {
              spread<constant.value, S>(
                  taps.size(), exponents, g.gradient, S::load(grad_pixel + c), scratch.data(),
                  [&](int64_t t) MMSOFTPOOL_INLINE_LAMBDA { return S::load(taps[t] + c); }, add);
            }
            if (const int64_t rest = width - c; rest > 0) {
              spread<0, S>(
                  taps.size(), exponents, g.gradient, S::load_first(grad_pixel + c, rest),
                  scratch.data(),
                  [&](int64_t t)
                      MMSOFTPOOL_INLINE_LAMBDA { return S::load_first(taps[t] + c, rest); },
                  add);
            }
          });
        }
      }
    }
    write_until(g.depth.in * g.height.in);
  }
}

// ---- instruction sets ----------------------------------------------------------------------

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  if (g.layout == Layout::contiguous) {
    forward_contiguous<Bytes>(g, input, output, begin, end);
  } else {
    forward_channels_last<Bytes>(g, input, output, begin, end);
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  if (g.layout == Layout::contiguous) {
    backward_contiguous<Bytes>(g, grad_output, input, grad_input, begin, end);
  } else {
    backward_channels_last<Bytes>(g, grad_output, input, grad_input, begin, end);
  }
}

// One library for every x86-64: the code above is compiled once per instruction set, and the widest
// that the machine has is taken at run time. Elsewhere 16 bytes are what every machine has.
#if defined(__x86_64__)
#define MMSOFTPOOL_AVX2 __attribute__((target("avx2,fma")))
#define MMSOFTPOOL_AVX512 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))

template <typename T>
MMSOFTPOOL_AVX2 void forward_avx2(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  forward<32>(g, input, output, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX512 void forward_avx512(
    const Geometry& g, const T* input, T* output, int64_t begin, int64_t end) {
  forward<64>(g, input, output, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX2 void backward_avx2(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  backward<32>(g, grad_output, input, grad_input, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX512 void backward_avx512(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
  backward<64>(g, grad_output, input, grad_input, begin, end);
}

const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#endif

}  // namespace

int64_t forward_items(const Geometry& g) {
  const int64_t rows = g.depth.out * g.height.out;
  return g.layout == Layout::contiguous ? g.planes() * rows : g.batch * rows;
}

int64_t channel_block(const Geometry& g, int64_t threads) {
  const int64_t wide = 64;
  return g.batch * ((g.channels + wide - 1) / wide) >= threads ? wide : 16;
}

int64_t backward_items(const Geometry& g) {
  const int64_t blocks = (g.channels + g.channel_block - 1) / g.channel_block;
  return g.layout == Layout::contiguous ? g.planes() : g.batch * blocks;
}

template <typename T>
void pool_forward(const Geometry& geometry, const T* input, T* output, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (has_avx512) {
    return forward_avx512(geometry, input, output, begin, end);
  }
  if (has_avx2) {
    return forward_avx2(geometry, input, output, begin, end);
  }
#endif
  forward<16>(geometry, input, output, begin, end);
}

template <typename T>
void pool_backward(
    const Geometry& geometry, const T* grad_output, const T* input, T* grad_input, int64_t begin,
    int64_t end) {
#if defined(__x86_64__)
  if (has_avx512) {
    return backward_avx512(geometry, grad_output, input, grad_input, begin, end);
  }
  if (has_avx2) {
    return backward_avx2(geometry, grad_output, input, grad_input, begin, end);
  }
#endif
  backward<16>(geometry, grad_output, input, grad_input, begin, end);
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                 \
  template void pool_forward<T>(const Geometry&, const T*, T*, int64_t, int64_t); \
  template void pool_backward<T>(const Geometry&, const T*, const T*, T*, int64_t, int64_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(Half)
MMSOFTPOOL_INSTANTIATE(BFloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cpu
