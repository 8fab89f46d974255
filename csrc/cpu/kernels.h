// The kernels that soft_pool.cpp chooses from, one source file each.
#pragma once

#include "soft_pool.h"

namespace mmsoftpool::cpu {

// The size of the vectors for these arguments: 64, 32 or 16 bytes.
template <typename T>
int64_t vector_bytes(const Pooling& pooling);

// Arguments are those of pool_forward and pool_backward.
#define MMSOFTPOOL_DECLARE_KERNEL(name)                                                           \
  template <typename T>                                                                           \
  void forward_##name(const Pooling&, const T* input, T* output, int64_t begin, int64_t end);     \
  template <typename T>                                                                           \
  void backward_##name(                                                                           \
      const Pooling&, int64_t channel_block, const T* grad_output, const T* input, T* grad_input, \
      int64_t begin, int64_t end);

MMSOFTPOOL_DECLARE_KERNEL(contiguous)
MMSOFTPOOL_DECLARE_KERNEL(channels_last)
// Not for double:
MMSOFTPOOL_DECLARE_KERNEL(contiguous_shared)
MMSOFTPOOL_DECLARE_KERNEL(channels_last_shared)
// Contiguous alone:
MMSOFTPOOL_DECLARE_KERNEL(one_window)
MMSOFTPOOL_DECLARE_KERNEL(adaptive)

// How many planes the last one pools together; a multiple of all vector lengths.
constexpr int64_t planes_side_by_side = 16;

#undef MMSOFTPOOL_DECLARE_KERNEL

}  // namespace mmsoftpool::cpu
