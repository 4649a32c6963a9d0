// A block of images laid out as one line of pixels in a thread's scratch: a convolution is a product of matrices there.
//
// Pixels whose coordinates leave the same remainder by the stride form a plane. In each, rows follow one another with
// zeros between them that serve as the right margin of one and the left of the next, and so do images. A tap of the
// kernel then lies at one distance from every pixel of the result; what is computed for zeros is left out at the end.

#pragma once

#include "images.h"

namespace {

constexpr int kStrip = 64;  // pixels whose sums stay in the first cache together

struct Extent {
  int height, width, channels;

  size_t image() const { return (size_t)height * width * channels; }
};

// Taps of one row of the kernel that lie side by side in a plane: `count` of them from `column` on, each `stride`
// behind the one before; read from `offset` pixels behind the result's.
struct Run {
  int row, column, count, plane;
  int64_t offset;
};

// The lines of a convolution's input (one a plane), its result and their gradients, which all have the same length.
struct Flat {
  int batch, size, stride, pad, together;  // together: images of a block
  Extent in, out;
  int height, width;  // of an image in a plane
  int reach;          // pixels that a tap may lie behind the result's

  Flat(const ffi::Span<const int64_t>& x, const ffi::Span<const int64_t>& y, int64_t size, int64_t stride)
      : batch(x[0]), size(size), stride(stride), pad(size / 2), in{(int)x[1], (int)x[2], (int)x[3]},
        out{(int)y[1], (int)y[2], (int)y[3]}, height((in.height - 1 + pad) / stride + 1),
        width((in.width - 1 + pad) / stride + 1), reach((size - 1) / stride * (width + 1)) {
    size_t bytes = sizeof(BFloat16) * height * width * std::max(planes() * in.channels, out.channels);
    int most = std::clamp<int>(kBlock / bytes, 1, std::max(1, batch / 8));
    // As many as leave the fewest strips in all: 512 channels of 2x2 images, forward, 3.4 ms; eight together, 4.8.
    int64_t best = INT64_MAX;
    for (int count = together = most; count > 0; count--)
      if (together = count; (int64_t)blocks() * line() < best) best = (int64_t)blocks() * line(), most = count;
    together = most;
  }

  int planes() const { return stride * stride; }
  int blocks() const { return (batch + together - 1) / together; }
  int images(int block) const { return std::min(together, batch - block * together); }
  // Pixels of a plane that are computed, in whole strips, and those that are in memory.
  int line() const { return (together * height * width + kStrip - 1) / kStrip * kStrip; }
  int kept() const { return line() + reach + 32; }
  // Whether no zeros lie among the pixels: as for 1x1 kernels.
  bool dense() const { return stride == 1 && pad == 0; }
  double pixels(int images) const { return (double)images * out.height * out.width; }  // of the result

  // What a pixel of the result is the sum of.
  std::vector<Run> Forward() const {
    std::vector<Run> runs;
    for (int i = 0; i < size; i++)
      for (int j = 0; j < std::min(stride, size); j++)
        runs.push_back({i, j, (size - j + stride - 1) / stride, i % stride * stride + j, i / stride * width});
    return runs;
  }

  // What a pixel of a plane of the input's gradient is the sum of, in the gradient of the result. A run's taps lie
  // there in reverse.
  std::vector<Run> Backward(int plane) const {
    std::vector<Run> runs;
    int column = plane % stride, count = (size - column + stride - 1) / stride;
    for (int i = plane / stride; i < size && column < size; i += stride)
      runs.push_back({i, column, count, 0, -(int64_t)(i / stride * width) - (count - 1)});
    return runs;
  }

  // visit(at, count, pixel) for every row of the result in pixels `begin` to `end` of the line: `count` of them from
  // `at` on, which are `pixel` and the following of the block's `images`.
  template <class F>
  void Results(int begin, int end, int images, F visit) const {
    Rows(begin, end, images, 1, 0, 0, out, visit);
  }
  // The same of a plane of the input: from `pixel` on, every `stride`th.
  template <class F>
  void Inputs(int plane, int begin, int end, int images, F visit) const {
    Rows(begin, end, images, stride, plane / stride - pad, plane % stride - pad, in, visit);
  }

 private:
  static constexpr size_t kBlock = 256 << 10;  // bytes of images, which stay in the second cache

  template <class F>
  void Rows(int begin, int end, int images, int apart, int top, int left, const Extent& of, F visit) const {
    if (dense()) {
      end = std::min(end, images * height * width);
      if (begin < end) visit(begin, end - begin, (size_t)begin);
      return;
    }
    int low = (apart - 1 - left) / apart, high = std::min(width, (of.width - left + apart - 1) / apart);
    for (int row = begin / width; row < std::min(images * height, (end + width - 1) / width); row++) {
      int image = row / height, y = row % height * apart + top;
      int first = std::max(begin - row * width, low), last = std::min(end - row * width, high);
      if (y >= 0 && y < of.height && first < last)
        visit(row * width + first, last - first, ((size_t)image * of.height + y) * of.width + first * apart + left);
    }
  }
};

// Zeros, of which pixels will be written over.
inline void Clear(const Flat& flat, int images, BFloat16* to, size_t pixels, int channels) {
  size_t first = flat.dense() ? (size_t)images * flat.height * flat.width : 0;
  std::memset(to + first * channels, 0, sizeof(*to) * (pixels - first) * channels);
}

// Lays out a block's input, read: planes one behind the other.
void ArrangeInput(const Flat& flat, int images, const Reading& read, const BFloat16* x, BFloat16* z) {
  int channels = flat.in.channels;
  Clear(flat, images, z, flat.planes() * flat.kept(), channels);
  for (int plane = 0; plane < flat.planes(); plane++, z += (size_t)flat.kept() * channels)
    flat.Inputs(plane, 0, flat.line(), images, [&](int at, int count, size_t pixel) {
      ForChannels<Vec16>(channels, [&](int c, auto lanes) {
        const BFloat16* from = x + pixel * channels + c;
        BFloat16* to = z + (size_t)at * channels + c;
        Normal<Vec16> normal = read.At<Vec16>(c);
        for (int i = 0; i < count; i++, from += flat.stride * channels, to += channels)
          lanes.Put(to, normal(lanes.Get(from)));
      });
    });
}

// Lays out the gradient of a block's result; before it lie `reach` zeros.
void ArrangeGradient(const Flat& flat, int images, const OutputGradient& gradient, const BFloat16* y,
                     const BFloat16* gy, BFloat16* g) {
  int features = flat.out.channels;
  Clear(flat, images, g, flat.reach + flat.kept(), features);
  g += (size_t)flat.reach * features;
  flat.Results(0, flat.line(), images, [&](int at, int count, size_t pixel) {
    ForChannels<Vec16>(features, [&](int f, auto lanes) {
      size_t from = pixel * features + f;
      BFloat16* to = g + (size_t)at * features + f;
      Handed<Vec16> handed = gradient.At<Vec16>(f);
      for (int i = 0; i < count; i++, from += features, to += features)
        lanes.Put(to, handed(lanes.Get(gy + from), lanes.Get(y + from)));
    });
  });
}

}  // namespace
