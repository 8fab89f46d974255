// Which kernel a pooling has.
#pragma once

#include "generic.h"
#include "ring.h"
#include "strip.h"

namespace mmsoftpool::cuda {

// Calls run(kernel) if the kernel fits the pooling.
template <typename Kernel, typename Run>
bool run_if_it_fits(const Pooling& pooling, Kernel kernel, const Run& run) {
  const bool fits = Kernel::fits(pooling);
  if (fits) {
    run(kernel);
  }
  return fits;
}

template <typename T, bool Backward, int K, int S, int Pad, typename Run>
bool run_strip(const Pooling& pooling, bool aligned, const Run& run) {
  for (const Axis* axis : {&pooling.height, &pooling.width}) {
    if (axis->kernel_size != K || axis->stride != S || axis->padding != Pad ||
        axis->dilation != 1) {
      return false;
    }
  }
  if (pooling.layout == Layout::channels_last) {
    // The backward's strips, whose edges are computed twice, are wider.
    using Last = Strip<T, K, S, Pad, Backward ? 2 : 1, Backward ? 2 : 4, false>;
    return aligned && pooling.channels % 4 == 0 && run_if_it_fits(pooling, Last(), run);
  }
  constexpr int cols = sizeof(T) == 4 ? 4 / S : 4;  // 16 bytes, or 8
  // Whether rows are whole packs, S numbers of which make an output. (A smaller out is that of a
  // 3 x 3 window without padding.)
  const int64_t in = pooling.width.in, out = pooling.width.out;
  const bool packed =
      aligned && in % (S * cols) == 0 && (K > S && Pad == 0 ? out <= in / S : out == in / S);
  return packed ? run_if_it_fits(pooling, Strip<T, K, S, Pad, cols, 1, true>(), run)
                : run_if_it_fits(pooling, Strip<T, K, S, Pad, cols, 1, false>(), run);
}

template <typename T, int K, typename Run>
bool run_ring(const Pooling& pooling, bool aligned, const Run& run) {
  return Ring<T, K, Access::packs>::has_packs(pooling, aligned)
             ? run_if_it_fits(pooling, Ring<T, K, Access::packs>(), run)
             : run_if_it_fits(pooling, Ring<T, K, Access::numbers>(), run);
}

// Calls run(kernel) with a Strip, a Ring or a General. `aligned` says that all tensors begin at a
// multiple of 16 bytes.
template <typename T, bool Backward, typename Run>
void with_kernel(const Pooling& pooling, bool aligned, const Run& run) {
  if constexpr (sizeof(T) <= 4) {
    const bool is_plane =
        pooling.depth.in == 1 && pooling.depth.out == 1 && pooling.depth.kernel_size == 1;
    constexpr int64_t limit = 1 << 28;  // columns and rows are counted in 32 bits
    // An alpha near 0 has a unit of its own, see Exponent.
    if (is_plane && !pooling.is_adaptive() && pooling.height.in < limit &&
        pooling.width.in < limit && pooling.channels < limit &&
        make_exponent<float>(pooling).unit == 1 &&
        (run_strip<T, Backward, 2, 2, 0>(pooling, aligned, run) ||
         run_strip<T, Backward, 3, 2, 0>(pooling, aligned, run) ||
         run_strip<T, Backward, 3, 2, 1>(pooling, aligned, run) ||
         run_ring<T, 3>(pooling, aligned, run) || run_ring<T, 5>(pooling, aligned, run) ||
         run_ring<T, 7>(pooling, aligned, run) || run_ring<T, 9>(pooling, aligned, run) ||
         run_ring<T, 11>(pooling, aligned, run) || run_ring<T, 13>(pooling, aligned, run))) {
      return;
    }
  }
  if (fits_32_bits(pooling)) {
    run(General<T, int32_t>());
  } else {
    run(General<T, int64_t>());
  }
}

}  // namespace mmsoftpool::cuda
