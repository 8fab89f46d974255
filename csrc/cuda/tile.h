// Large windows of stride 1, such as the 5 x 5, 9 x 9 and 13 x 13 of YOLO's SPP: a block of threads
// pools a tile. Neighbouring windows share most of their taps, so each input has one exponential,
// not one for every window around it, and sums over windows are taken along rows, then columns.
//
// A weight e^(alpha x) is the power 2^(c x), c = alpha log2 e, relative to the largest input of the
// tile. That reference cancels in every window; it only sets the range. Where the range does not
// suffice (a window far below the tile's maximum, NaN, infinity), the block computes in the general
// way. csrc/cpu/powers.h does the same for the CPU.
//
// The threads of a block work in phases with a barrier after each. A phase is a function of the
// number of the thread, which `block` calls: on a GPU for the thread that it is, in the tests for
// one thread after the other.
#pragma once

#include <algorithm>
#include <cstring>

#include "generic.h"

namespace mmsoftpool::cuda {

// Two sums, moved together.
template <typename A>
struct alignas(2 * sizeof(A)) Pair {
  A first, second;

  MMSOFTPOOL_BODY Pair& operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
  friend MMSOFTPOOL_BODY Pair operator+(Pair a, const Pair& b) { return a += b; }
};

// The powers of the inputs of a tile, 2^(c x - reference).
template <typename A>
struct Powers {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  static constexpr int digits = std::numeric_limits<A>::digits - 1;
  static constexpr int bias = std::numeric_limits<A>::max_exponent - 1;
  // Adding it rounds to an integer, and leaves that in the low bits.
  static constexpr A magic = A(Bits(3) << (digits - 1));
  static constexpr A limit = 1 << 20;  // of |c x|
  // The largest power is 2^headroom: windows may be as much further below it.
  static constexpr int headroom = 32;
  // Sums of powers are right if they are not below this: taps that count as 0 are below 2^-126 (in
  // double, 2^-1022).
  static constexpr A smallest_sum = sizeof(A) == 4 ? A(0x1p-88) : A(0x1p-900);

  A c, per_c;

  explicit Powers(const Pooling& pooling)
      : c(A(pooling.alpha * 1.4426950408889634)), per_c(1 / c) {}

  // An alpha for which inputs have room, and most windows are not far below the tile's maximum.
  static bool fits(const Pooling& pooling) { return pooling.alpha >= 1e-6 && pooling.alpha <= 64; }

  struct Reference {
    A exponent;  // an integer: of the largest input
    A scale;     // c, or NaN for a tile with numbers too large
    A floor;     // inputs of a power of 0
    Bits bias;   // of the exponent of an A, with the reference
  };
  // max: the largest input, ignoring NaN.
  MMSOFTPOOL_BODY Reference reference(A max) const {
    const A x = max > -limit * per_c ? max : -limit * per_c;
    const bool fits = x * c <= limit;
    const A shifted = (fits ? x * c : A(0)) + magic;
    const A exponent = shifted - magic;
    return {
        exponent, fits ? c : std::numeric_limits<A>::quiet_NaN(),
        (exponent - A(headroom + bias)) * per_c, Bits(headroom + bias) - to_bits(shifted)};
  }

  // The power of an input, at most 2^headroom, and its logarithm without the headroom. -inf has a
  // power of 0 and a finite logarithm.
  struct Power {
    A power, log2;
  };
  static MMSOFTPOOL_BODY A floored(const Reference& reference, A x) {
    return reference.floor > x ? reference.floor : x;  // NaN stays
  }
  // x: floored.
  static MMSOFTPOOL_BODY Power power(const Reference& reference, A x) {
    const A shifted = std::fma(x, reference.scale, magic);
    const A n = shifted - magic;
    const A fraction = std::fma(x, reference.scale, -n);  // without the rounding error of c x
    return {
        exp2_or_zero(fraction) * from_bits((to_bits(shifted) + reference.bias) << digits),
        (n - reference.exponent) + fraction};
  }

 private:
  template <typename To, typename From>
  static MMSOFTPOOL_BODY To copy_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
  static MMSOFTPOOL_BODY Bits to_bits(A x) { return copy_bits<Bits>(x); }
  static MMSOFTPOOL_BODY A from_bits(Bits x) { return copy_bits<A>(x); }
};

// Divides numbers below 2^15 by one of them, without the twenty instructions of a division.
struct Divisor {
  uint32_t divisor = 1, multiplier = 0;

  Divisor() = default;
  explicit Divisor(int32_t divisor) : divisor(divisor), multiplier((1u << 31) / divisor + 1) {}
  MMSOFTPOOL_BODY int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(uint64_t(uint32_t(n)) * multiplier >> 31);
  }
  MMSOFTPOOL_BODY int32_t remainder(int32_t n, int32_t quotient) const {
    return n - quotient * static_cast<int32_t>(divisor);
  }
};

// How the threads of a block, or those of a channel, share the elements of a rectangle: each has
// some rows of a column, or of several if there are more columns than threads.
struct Walk {
  Divisor width;
  int32_t rows, columns;  // from an element of a thread to the next

  Walk(int32_t width, int32_t threads)
      : width(std::min(width, threads)),
        rows(threads / static_cast<int32_t>(this->width.divisor)),
        columns(static_cast<int32_t>(this->width.divisor)) {}

  // Calls visit(row, column) for the elements of thread i, or for each first one of `batch`.
  template <typename Visit>
  MMSOFTPOOL_BODY void for_each(
      int32_t i, int32_t height, int32_t width_here, int batch, const Visit& visit) const {
    const int32_t first = width.quotient(i);
    if (first < rows) {
      MMSOFTPOOL_NO_UNROLL
      for (int32_t column = width.remainder(i, first); column < width_here; column += columns) {
        MMSOFTPOOL_NO_UNROLL
        for (int32_t row = first; row < height; row += batch * rows) {
          visit(row, column);
        }
      }
    }
  }
};

// A range of an axis.
struct Part {
  int32_t first, size;
};
MMSOFTPOOL_BODY Part clip(int32_t first, int32_t end, int32_t size) {
  first = first > 0 ? first : 0;
  end = end < size ? end : size;
  return {first, end > first ? end - first : 0};
}

// An axis of the pooling and of its tiles, all of one size but for the edges of the map. A tile has
// windows and the inputs that they reach: in the forward it writes the windows' outputs, in the
// backward the gradients of some of the inputs, those that have no windows but the tile's.
struct TileAxis {
  int32_t in, out, kernel_size, padding;
  int32_t written, tiles;   // outputs or gradients that a tile writes at most; tiles
  int32_t inputs, windows;  // of a tile, at most

  TileAxis(const Axis& axis, bool backward, int64_t number)
      : in(static_cast<int32_t>(axis.in)),
        out(static_cast<int32_t>(axis.out)),
        kernel_size(static_cast<int32_t>(axis.kernel_size)),
        padding(static_cast<int32_t>(axis.padding)) {
    const int32_t all = backward ? in : out;
    written = static_cast<int32_t>((all + number - 1) / number);
    tiles = (all + written - 1) / written;
    windows = std::min(out, written + (backward ? kernel_size - 1 : 0));
    inputs = std::min(in, windows + kernel_size - 1);
  }

  MMSOFTPOOL_BODY Part inputs_of(const Part& windows) const {
    const int32_t first = windows.first - padding;
    return clip(first, first + windows.size - 1 + kernel_size, in);
  }
  MMSOFTPOOL_BODY Part windows_of(const Part& inputs) const {
    const int32_t end = inputs.first + inputs.size + padding;
    return clip(first_window(inputs.first), end, out);
  }
  MMSOFTPOOL_BODY int32_t first_input(int32_t window) const { return window - padding; }
  MMSOFTPOOL_BODY int32_t first_window(int32_t input) const {
    return input + padding - kernel_size + 1;
  }
};

constexpr int group = 4;  // windows that a thread sums at once

// The sums over [first + j, first + j + count) for j in [0, group), group <= count, of the numbers
// shared[at + i * step], which are 0 outside [0, size). What the sums share is added up once.
// shared[0] is 0.
template <typename A>
MMSOFTPOOL_BODY void add_up(
    const Pair<A>* shared, int32_t at, int32_t step, int32_t first, int32_t size, int32_t count,
    Pair<A> (&sums)[group]) {
  // All positions are times the step.
  first *= step;
  size *= step;
  count *= step;
  const auto read = [&](int32_t i) { return shared[uint32_t(i) < uint32_t(size) ? at + i : 0]; };
  Pair<A> before[group - 1], after[group - 1], middle{0, 0};
  MMSOFTPOOL_UNROLL
  for (int j = 0; j < group - 1; ++j) {
    before[j] = read(first + j * step);
    after[j] = read(first + count + j * step);
  }
  const auto inside = [&](int32_t i) { return i < 0 ? 0 : i < size ? i : size; };
  const Pair<A>* next = shared + at + inside(first + (group - 1) * step);
  const Pair<A>* const last = shared + at + inside(first + count);
  MMSOFTPOOL_NO_UNROLL
  for (; next < last; next += step) {
    middle += *next;
  }
  MMSOFTPOOL_UNROLL
  for (int j = 1; j < group - 1; ++j) {
    before[group - 2 - j] += before[group - 1 - j];
    after[j] += after[j - 1];
  }
  MMSOFTPOOL_UNROLL
  for (int j = 0; j < group; ++j) {
    sums[j] = middle;
    if (j < group - 1) {
      sums[j] += before[j];
    }
    if (j > 0) {
      sums[j] += after[j - 1];
    }
  }
}

template <typename T, bool Backward>
struct Tile {
  using A = Compute<T>;
  using Numbers = Pair<A>;
  using Reference = typename Powers<A>::Reference;

  static constexpr int max_threads = 256;
  // Bytes of shared memory: every GPU has 64 KiB for a block, of which Block takes a little.
  static constexpr int64_t max_shared = 63 << 10;

  struct Arguments {
    Indices<int64_t> indices;  // for the general way
    Exponent<A> exponent;
    Powers<A> powers;
    A slope;  // d log(2^t) / dt for the exact gradient, 0 for the paper's
    TileAxis height, width;
    int32_t step;                    // from a column to the next
    int32_t lanes, log2_lanes;       // neighbouring channels of a tile
    int32_t lane_blocks;             // blocks of them
    int64_t planes;                  // of the grid: planes, or blocks of neighbouring channels
    int32_t rows, pitch, sum_pitch;  // of the two arrays in shared memory
    int32_t threads;
    Divisor inputs_h, windows_w, windows_h, written_w;
    Walk inputs, windows, written;             // the elements of a tile
    int32_t inputs_step, outputs_w, inputs_w;  // in memory: from an input of a thread to the next,
                                               // from an output's row to the next, from an input's

    Arguments(const Pooling& pooling, int log2_lanes, int64_t tiles_h, int64_t tiles_w)
        : indices(pooling),
          exponent(make_exponent<A>(pooling)),
          powers(pooling),
          slope(pooling.gradient == Gradient::exact ? A(0.69314718055994531) : A(0)),
          height(pooling.height, Backward, tiles_h),
          width(pooling.width, Backward, tiles_w),
          step(
              pooling.layout == Layout::channels_last ? static_cast<int32_t>(pooling.channels) : 1),
          lanes(1 << log2_lanes),
          log2_lanes(log2_lanes),
          lane_blocks(((step - 1) >> log2_lanes) + 1),
          planes(step > 1 ? pooling.batch * lane_blocks : pooling.planes()),
          rows(std::max(height.inputs, height.windows)),
          // Odd numbers of columns, so that neighbouring rows are in different banks.
          pitch((std::max(width.inputs, width.windows) | 1) << log2_lanes),
          sum_pitch((round_up(std::max(width.windows, width.written), group) | 1) << log2_lanes),
          threads(count_threads()),
          inputs_h(height.inputs),
          windows_w(width.windows),
          windows_h(height.windows),
          written_w(width.written),
          inputs(width.inputs, threads >> log2_lanes),
          windows(width.windows, threads >> log2_lanes),
          written(width.written, threads >> log2_lanes),
          inputs_step(static_cast<int32_t>(int64_t(inputs.rows) * width.in * step)),
          outputs_w(width.out * step),
          inputs_w(width.in * step) {}

    // Whole warps, each thread with several items so that finding its place costs little.
    int32_t count_threads() const {
      const int64_t items = int64_t(height.inputs) * ((width.windows + group - 1) / group)
                            << log2_lanes;
      const int64_t rounds = std::max<int64_t>(4, (items + max_threads - 1) / max_threads);
      return round_up(static_cast<int32_t>((items + rounds - 1) / rounds), 32);
    }

    int64_t shared() const {
      return (lanes + int64_t(rows) * (pitch + sum_pitch)) * sizeof(Numbers);
    }
    // Inputs that a tile reads for each number that it writes.
    double overhead() const {
      return double(height.inputs) * width.inputs / (double(height.written) * width.written);
    }

    static int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }
  };

  // Where a thread is: its tile, and the plane in global and in shared memory. All items of a
  // thread have the same channel.
  struct Place {
    Part inputs_h, inputs_w, windows_h, windows_w, written_h, written_w;
    int64_t input, output, plane;
    Numbers* shared;
    int32_t numbers, sums;  // where the two arrays begin for this channel
    int32_t item, items;    // first one, and from one to the next
  };
  static MMSOFTPOOL_BODY Place
  find_place(const Arguments& a, Numbers* shared, int32_t plane, int32_t h, int32_t w, int32_t i) {
    Place place;
    h *= a.height.written;
    w *= a.width.written;
    place.written_h = clip(h, h + a.height.written, Backward ? a.height.in : a.height.out);
    place.written_w = clip(w, w + a.width.written, Backward ? a.width.in : a.width.out);
    place.windows_h = Backward ? a.height.windows_of(place.written_h) : place.written_h;
    place.windows_w = Backward ? a.width.windows_of(place.written_w) : place.written_w;
    place.inputs_h = a.height.inputs_of(place.windows_h);
    place.inputs_w = a.width.inputs_of(place.windows_w);
    const int32_t lane = i & (a.lanes - 1);
    int32_t c = 0;
    if (a.step > 1) {
      const int32_t n = plane / a.lane_blocks;
      c = ((plane - n * a.lane_blocks) << a.log2_lanes) + lane;
      plane = n;
    }
    place.input = int64_t(plane) * (a.height.in * a.width.in * a.step) + c;
    place.output = int64_t(plane) * (a.height.out * a.width.out * a.step) + c;
    place.plane = int64_t(plane) * a.step + c;
    place.shared = shared;
    place.numbers = a.lanes + lane;
    place.sums = place.numbers + a.rows * a.pitch;
    // No items for a channel that there is not.
    place.item = c < a.step ? i >> a.log2_lanes : INT32_MAX >> 1;
    place.items = a.threads >> a.log2_lanes;
    return place;
  }

  static MMSOFTPOOL_BODY Numbers& number(
      const Arguments& a, const Place& place, int32_t row, int32_t column) {
    return place.shared[place.numbers + row * a.pitch + column * a.lanes];
  }
  static MMSOFTPOOL_BODY Numbers& sum(
      const Arguments& a, const Place& place, int32_t row, int32_t column) {
    return place.shared[place.sums + row * a.sum_pitch + column * a.lanes];
  }
  // Offset in the plane, rows of which are `pitch` apart, of an element of a part of it.
  static MMSOFTPOOL_BODY int32_t element(
      const Arguments& a, const Part& h, const Part& w, int32_t pitch, int32_t row,
      int32_t column) {
    return (h.first + row) * pitch + (w.first + column) * a.step;
  }

  // Sums over the columns of `numbers`, in `size` of which there are any, to `sums`. The first of
  // the `wanted` sums begins at column `first`.
  static MMSOFTPOOL_BODY void add_columns(
      const Arguments& a, const Place& place, const Divisor& rows, int32_t present_rows,
      int32_t first, int32_t size, int32_t wanted) {
    const int32_t count = (wanted + group - 1) / group * static_cast<int32_t>(rows.divisor);
    MMSOFTPOOL_NO_UNROLL
    for (int32_t i = place.item; i < count; i += place.items) {
      const int32_t column = rows.quotient(i) * group;
      const int32_t row = i - rows.quotient(i) * static_cast<int32_t>(rows.divisor);
      if (row < present_rows) {
        Numbers sums[group];
        add_up(
            place.shared, place.numbers + row * a.pitch, a.lanes, first + column, size,
            a.width.kernel_size, sums);
        Numbers* const to = &sum(a, place, row, column);
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < group; ++j) {
          to[j * a.lanes] = sums[j];
        }
      }
    }
  }
  // Then over the rows of `sums`. Calls visit(row, column, at, sum), where `at` is the element's
  // offset in a plane of this pitch, of which the sums are the part (h, w).
  template <typename Visit>
  static MMSOFTPOOL_BODY void add_rows(
      const Arguments& a, const Place& place, const Divisor& columns, const Part& h, const Part& w,
      int32_t pitch, int32_t first, int32_t size, const Visit& visit) {
    const int32_t count = (h.size + group - 1) / group * static_cast<int32_t>(columns.divisor);
    MMSOFTPOOL_NO_UNROLL
    for (int32_t i = place.item; i < count; i += place.items) {
      const int32_t row = columns.quotient(i) * group;
      const int32_t column = columns.remainder(i, columns.quotient(i));
      if (column < w.size) {
        Numbers sums[group];
        add_up(
            place.shared, place.sums + column * a.lanes, a.sum_pitch, first + row, size,
            a.height.kernel_size, sums);
        const int32_t at = element(a, h, w, pitch, row, column);
        MMSOFTPOOL_UNROLL
        for (int j = 0; j < group; ++j) {
          if (row + j < h.size) {
            visit(row + j, column, at + j * pitch, sums[j]);
          }
        }
      }
    }
  }

  // The phases up to the sums of windows along the columns. Returns the largest inputs, by lane.
  template <typename Block>
  static MMSOFTPOOL_BODY auto sum_windows(
      const Block& block, const Arguments& a, const T* input, Numbers* shared, int32_t plane,
      int32_t h, int32_t w) {
    const auto largest = block.template max<A>(a.log2_lanes, [&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      if (i == 0) {
        shared[0] = {0, 0};
      }
      const T* const from = input + place.input;
      // Several loads at once, since memory takes long to answer.
      constexpr int batch = 4;
      A max = -std::numeric_limits<A>::infinity();
      a.inputs.for_each(
          place.item, place.inputs_h.size, place.inputs_w.size, batch,
          [&](int32_t row, int32_t column) {
            A x[batch];
            const int32_t at = element(a, place.inputs_h, place.inputs_w, a.inputs_w, row, column);
            Numbers* const to = &number(a, place, row, column);
            MMSOFTPOOL_UNROLL
            for (int j = 0; j < batch; ++j) {
              x[j] = row + j * a.inputs.rows < place.inputs_h.size
                         ? A(from[at + j * a.inputs_step])
                         : -std::numeric_limits<A>::infinity();
              max = fmax(max, x[j]);
            }
            MMSOFTPOOL_UNROLL
            for (int j = 0; j < batch; ++j) {
              if (row + j * a.inputs.rows < place.inputs_h.size) {
                to[j * a.inputs.rows * a.pitch].first = x[j];
              }
            }
          });
      return max;
    });
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      const Reference reference = a.powers.reference(largest[i]);
      a.inputs.for_each(
          place.item, place.inputs_h.size, place.inputs_w.size, 1,
          [&](int32_t row, int32_t column) {
            Numbers& numbers = number(a, place, row, column);
            // In the forward the power times the input, whose rounding error is that of the
            // output; in the backward, where inputs are subtracted, times the logarithm.
            const A x = Powers<A>::floored(reference, numbers.first);
            const auto power = Powers<A>::power(reference, x);
            numbers = {power.power, power.power * (Backward ? power.log2 : x)};
          });
    });
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      const int32_t first = a.width.first_input(place.windows_w.first) - place.inputs_w.first;
      add_columns(
          a, place, a.inputs_h, place.inputs_h.size, first, place.inputs_w.size,
          place.windows_w.size);
    });
    return largest;
  }
  // And along the rows. Calls visit(row, column, sum).
  template <typename Visit>
  static MMSOFTPOOL_BODY void finish_windows(
      const Arguments& a, const Place& place, const Visit& visit) {
    const int32_t first = a.height.first_input(place.windows_h.first) - place.inputs_h.first;
    add_rows(
        a, place, a.windows_w, place.windows_h, place.windows_w, a.outputs_w, first,
        place.inputs_h.size, visit);
  }

  static MMSOFTPOOL_BODY Window<A> general_window(
      const Arguments& a, const Place& place, const T* input, int32_t row, int32_t column) {
    const Position<int64_t> position{
        place.plane, 0, place.windows_h.first + row, place.windows_w.first + column};
    return window_of(a.indices, a.exponent, input, position);
  }

  // A block computes tile (h, w) of a plane, or of a block of neighbouring channels.
  template <typename Block>
  static MMSOFTPOOL_BODY void forward(
      const Block& block, const Arguments& a, const T* input, T* output, Numbers* shared,
      int32_t plane, int32_t h, int32_t w) {
    sum_windows(block, a, input, shared, plane, h, w);
    const bool is_wrong = block.any([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      bool is_right = true;
      T* const to = output + place.output;
      finish_windows(a, place, [&](int32_t, int32_t, int32_t at, const Numbers& sum) {
        is_right &= sum.first >= Powers<A>::smallest_sum;
        to[at] = T(sum.second * reciprocal(sum.first));
      });
      return !is_right;
    });
    if (is_wrong) {
      block.each([&](int32_t i) {
        const Place place = find_place(a, shared, plane, h, w, i);
        finish_windows(a, place, [&](int32_t row, int32_t column, int32_t at, const Numbers& sum) {
          if (!(sum.first >= Powers<A>::smallest_sum)) {
            output[place.output + at] = T(general_window(a, place, input, row, column).output());
          }
        });
      });
    }
  }

  // The gradient of input i is, with its power p_i = 2^(v_i) and the sum S of the powers of each
  // window around it, the sum of g p_i / S (1 + alpha (x_i - y)) = p_i (a + ln 2 v_i b). a and b
  // are summed over those windows in the same way as the powers over a window.
  template <typename Block>
  static MMSOFTPOOL_BODY void backward(
      const Block& block, const Arguments& a, const T* grad_output, const T* input, T* grad_input,
      Numbers* shared, int32_t plane, int32_t h, int32_t w) {
    const auto largest = sum_windows(block, a, input, shared, plane, h, w);
    const bool is_wrong = block.any([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      bool is_right = true;
      const T* const grads = grad_output + place.output;
      finish_windows(a, place, [&](int32_t row, int32_t column, int32_t at, const Numbers& sum) {
        constexpr A most = A(0x1p100);  // no overflow in sums and products, if g is not beyond it
        const A grad = A(grads[at]);
        const A per_sum = reciprocal(sum.first);
        const A b = grad * per_sum;
        is_right &= sum.first >= Powers<A>::smallest_sum && b <= most && b >= -most &&
                    grad <= most && grad >= -most;
        number(a, place, row, column) = {b * (1 - a.slope * (sum.second * per_sum)), b};
      });
      return !is_right;
    });
    if (is_wrong) {
      return backward_generally(block, a, grad_output, input, grad_input, shared, plane, h, w);
    }
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      const int32_t first = a.width.first_window(place.written_w.first) - place.windows_w.first;
      add_columns(
          a, place, a.windows_h, place.windows_h.size, first, place.windows_w.size,
          place.written_w.size);
    });
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      const Reference reference = a.powers.reference(largest[i]);
      const int32_t first = a.height.first_window(place.written_h.first) - place.windows_h.first;
      const T* const from = input + place.input;
      T* const to = grad_input + place.input;
      add_rows(
          a, place, a.written_w, place.written_h, place.written_w, a.inputs_w, first,
          place.windows_h.size, [&](int32_t, int32_t, int32_t at, const Numbers& sum) {
            const A x = Powers<A>::floored(reference, A(from[at]));
            const auto power = Powers<A>::power(reference, x);
            to[at] = T(power.power * (sum.first + a.slope * power.log2 * sum.second));
          });
    });
  }

  // As summarize_window and backward_generic, for the windows and the inputs of a tile.
  template <typename Block>
  static MMSOFTPOOL_BODY void backward_generally(
      const Block& block, const Arguments& a, const T* grad_output, const T* input, T* grad_input,
      Numbers* shared, int32_t plane, int32_t h, int32_t w) {
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      a.windows.for_each(
          place.item, place.windows_h.size, place.windows_w.size, 1,
          [&](int32_t row, int32_t column) {
            const Window<A> window = general_window(a, place, input, row, column);
            const int64_t at =
                place.output +
                element(a, place.windows_h, place.windows_w, a.outputs_w, row, column);
            number(a, place, row, column) = {window.max, window.scale(A(grad_output[at]))};
            sum(a, place, row, column).first = window.offset();
          });
    });
    block.each([&](int32_t i) {
      const Place place = find_place(a, shared, plane, h, w, i);
      a.written.for_each(
          place.item, place.written_h.size, place.written_w.size, 1,
          [&](int32_t row, int32_t column) {
            const int64_t at =
                place.input + element(a, place.written_h, place.written_w, a.inputs_w, row, column);
            const A x = A(input[at]);
            const Part around_h = a.height.windows_of({place.written_h.first + row, 1});
            const Part around_w = a.width.windows_of({place.written_w.first + column, 1});
            A grad = 0;
            for (int32_t oh = 0; oh < around_h.size; ++oh) {
              for (int32_t ow = 0; ow < around_w.size; ++ow) {
                const int32_t r = around_h.first - place.windows_h.first + oh;
                const int32_t c = around_w.first - place.windows_w.first + ow;
                const Numbers& summary = number(a, place, r, c);
                const Window<A> window(a.exponent, summary.first);
                grad +=
                    summary.second * window.share(x, sum(a, place, r, c).first, a.indices.gradient);
              }
            }
            grad_input[at] = T(grad);
          });
    });
  }
};

// Calls run(arguments) with the tiles of the pooling and returns true; returns false if it has
// none, which is for windows smaller than 4 x 4, where the general kernel is as fast, for a stride
// or dilation other than 1, and for windows so large that hardly anything is shared in a tile.
template <typename T, bool Backward, typename Run>
bool with_tile(const Pooling& pooling, const Run& run) {
  using TileOf = Tile<T, Backward>;
  const int64_t step = pooling.layout == Layout::channels_last ? pooling.channels : 1;
  for (const Axis* axis : {&pooling.height, &pooling.width}) {
    if (axis->adaptive || axis->kernel_size < group || axis->stride != 1 || axis->dilation != 1 ||
        axis->in > INT32_MAX / 4 || axis->out > INT32_MAX / 4 || axis->padding > INT32_MAX / 4 ||
        axis->kernel_size > 1000 || axis->in < 1 || axis->out < 1 || axis->out * 2 < axis->in) {
      return false;
    }
  }
  if (pooling.depth.in != 1 || pooling.depth.out != 1 || pooling.depth.kernel_size != 1 ||
      !Powers<Compute<T>>::fits(pooling) || make_exponent<Compute<T>>(pooling).unit != 1 ||
      pooling.in_plane() > INT32_MAX / step || pooling.out_plane() > INT32_MAX / step) {
    return false;
  }
  // Neighbouring channels of a tile, as many as a memory transaction has; fewer for larger windows,
  // whose tiles would be too small otherwise.
  for (int log2_lanes = step > 1 ? 3 : 0; log2_lanes >= 0; --log2_lanes) {
    // From tiles of 128 x 128 on: none is larger.
    const auto tiles = [](const Axis& axis) {
      return ((Backward ? axis.in : axis.out) + 127) / 128;
    };
    int64_t tiles_h = tiles(pooling.height), tiles_w = tiles(pooling.width);
    while (true) {
      const typename TileOf::Arguments arguments(pooling, log2_lanes, tiles_h, tiles_w);
      if (arguments.shared() <= TileOf::max_shared) {
        if (arguments.overhead() > (log2_lanes > 0 ? 2 : 4) || arguments.planes > INT32_MAX ||
            arguments.height.tiles > UINT16_MAX || arguments.width.tiles > UINT16_MAX) {
          break;
        }
        run(arguments);
        return true;
      }
      if (arguments.height.written == 1 && arguments.width.written == 1) {
        break;
      }
      ++(arguments.height.written > arguments.width.written ? tiles_h : tiles_w);
    }
  }
  return false;
}

}  // namespace mmsoftpool::cuda
