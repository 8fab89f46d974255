// Adaptive pooling of small contiguous maps, as of a classifier's last one: few windows in a row,
// each with few taps in a row, leave most of a vector unused. Planes are pooled side by side
// instead: copied to channels last, as many as the widest vector has lanes, and back.
#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace mmsoftpool::cpu {
namespace {

constexpr int64_t block = planes_side_by_side;

// That many planes as one image, channels last.
Pooling image_of(const Pooling& pooling) {
  Pooling image = pooling;
  image.layout = Layout::channels_last;
  image.batch = 1;
  image.channels = block;
  return image;
}

// Calls move(place in the planes, place in the image) for each of their numbers, in tiles that stay
// in the first cache.
template <typename Move>
void for_each_place(int64_t planes, int64_t size, const Move& move) {
  for (int64_t first = 0; first < size; first += block) {
    const int64_t end = std::min(first + block, size);
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t i = first; i < end; ++i) {
        move(plane * size + i, i * block + plane);
      }
    }
  }
}

// The planes of the last block that do not exist are left as they are.
template <typename T>
void to_channels_last(const T* planes, int64_t number, int64_t size, T* image) {
  for_each_place(number, size, [=](int64_t from, int64_t to) { image[to] = planes[from]; });
}

template <typename T>
void to_contiguous(const T* image, int64_t number, int64_t size, T* planes) {
  for_each_place(number, size, [=](int64_t to, int64_t from) { planes[to] = image[from]; });
}

}  // namespace

// Items are blocks of planes.
template <typename T>
void forward_adaptive(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  const Pooling image = image_of(pooling);
  const int64_t in = pooling.in_plane(), out = pooling.out_plane();
  std::vector<T> x(in * block), y(out * block);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * block, number = std::min(block, pooling.planes() - first);
    to_channels_last(input + first * in, number, in, x.data());
    pool_forward(image, x.data(), y.data(), 0, forward_items(image));
    to_contiguous(y.data(), number, out, output + first * out);
  }
}

template <typename T>
void backward_adaptive(
    const Pooling& pooling, int64_t, const T* grad_output, const T* input, T* grad_input,
    int64_t begin, int64_t end) {
  const Pooling image = image_of(pooling);
  const int64_t in = pooling.in_plane(), out = pooling.out_plane();
  std::vector<T> x(in * block), grad_x(in * block), grad_y(out * block);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * block, number = std::min(block, pooling.planes() - first);
    to_channels_last(input + first * in, number, in, x.data());
    to_channels_last(grad_output + first * out, number, out, grad_y.data());
    pool_backward(image, block, grad_y.data(), x.data(), grad_x.data(), 0, 1);
    to_contiguous(grad_x.data(), number, in, grad_input + first * in);
  }
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                    \
  template void forward_adaptive<T>(const Pooling&, const T*, T*, int64_t, int64_t); \
  template void backward_adaptive<T>(                                                \
      const Pooling&, int64_t, const T*, const T*, T*, int64_t, int64_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(Half)
MMSOFTPOOL_INSTANTIATE(BFloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cpu
