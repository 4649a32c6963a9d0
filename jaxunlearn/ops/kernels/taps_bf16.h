// The gradient of a kernel, over pairs of images.

#pragma once

#include "pairs_bf16.h"

namespace {

struct Shape {
  int batch, size, stride;
  Images in, out;

  Shape(const ffi::Span<const int64_t>& x, const ffi::Span<const int64_t>& y, int64_t size, int64_t stride)
      : batch(x[0]), size(size), stride(stride), in{(int)x[1], (int)x[2], (int)x[3]},
        out{(int)y[1], (int)y[2], (int)y[3]} {}

  int pad() const { return size / 2; }
  int taps() const { return size * size; }
  int blocks() const { return (batch + kImages - 1) / kImages; }
  int images(int block) const { return std::min(kImages, batch - block * kImages); }
  size_t kernel() const { return (size_t)taps() * in.channels * out.channels; }
  int pixels() const { return batch * out.height * out.width; }
};

// Pixels in a row of the output, and where they and the input's pixels lie among the paired images.
struct Span {
  size_t x, g;
  int count;
};

// Gradients of M channels' taps for N vectors of features, or of N taps for one, that lie `apart` in g and `out_apart`
// in the gradient.
template <int M, int N>
inline void AddTaps(const std::vector<Span>& spans, int stride, const Bits16* x, int channel, const Bits16* g,
                    int64_t apart, float* gradient, size_t out_apart, int channels, int features, int lanes) {
  Vec16 sum[M][N] = {};
  for (const Span& span : spans) {
    const Bits16 *at = x + span.x, *from = g + span.g;
    for (int i = 0; i < span.count; i++, at += (stride - 1) * kImages / 2)
#pragma GCC unroll 1
      for (int b = 0; b < kImages / 2; b++, at++, from++) {
        Bits16 v[N];
        for (int n = 0; n < N; n++) v[n] = from[n * apart];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          Bits16 value = Broadcast((*at)[channel + m]);
#pragma GCC unroll 3
          for (int n = 0; n < N; n++) sum[m][n] = Dot(sum[m][n], value, v[n]);
        }
      }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 3
    for (int n = 0; n < N && m < channels; n++) {
      float* to = gradient + (size_t)m * features + n * out_apart;
      StoreSome(to, LoadSome<Vec16>(to, lanes) + sum[m][n], lanes);
    }
}

// Adds the gradient of `panels` panels of the kernel's channels from `panel` on, over `blocks` blocks that lie `xs` and
// `gs` apart. Some pixels at a time, whose panels stay in the first cache.
ONCE void AddKernelGradient(const Shape& s, int panel, int panels, int blocks, const Bits16* x, size_t xs,
                            const Bits16* g, size_t gs, float* gradient) {
  int rows = std::max(1, 32 / s.out.width), together = std::max(1, 32 / (s.out.width * s.out.height));
  // With one vector of features, whole rows of taps share what is read of x.
  bool overlap = s.size == 3 && s.stride == 1 && s.out.panels() == 1;
  std::vector<std::vector<Span>> spans(s.taps());
  for (int block = 0; block < blocks; block += together)
    for (int row = 0; row < s.out.height; row += rows) {
      for (int tap = 0; tap < s.taps(); tap++) {
        spans[tap].clear();
        int i = tap / s.size - s.pad(), j = tap % s.size - s.pad();
        int first = j < 0 ? (-j + s.stride - 1) / s.stride : 0;
        int last = overlap ? first + s.in.width : std::min(s.out.width, (s.in.width - j + s.stride - 1) / s.stride);
        for (int b = block; b < std::min(blocks, block + together); b++)
          for (int y = row; y < std::min(s.out.height, row + rows); y++) {
            int at = y * s.stride + i;
            if (at < 0 || at >= s.in.height || first >= last) continue;
            spans[tap].push_back(
                {b * xs + ((size_t)at * s.in.width + first * s.stride + j) * (kImages / 2),
                 b * gs + ((size_t)y * (s.out.width + 2 * s.pad()) + s.pad() + first) * (kImages / 2), last - first});
          }
      }
      int channels = s.in.channels, features = s.out.channels;
      for (int n = panel; n < panel + panels; n++)
        for (int f = 0, vectors; f < s.out.panels(); f += vectors) {
          int lanes = features - 16 * f;
          vectors = lanes >= 32 ? 2 : 1;
          for (int tap = 0; tap < s.taps(); tap += overlap ? 3 : 1) {
            auto add = [&]<int M, int N>(int channel, int64_t apart, size_t out_apart) {
              int c = 16 * n + channel;
              AddTaps<M, N>(spans[tap], s.stride, x + n * s.in.panel(0), channel, g + f * s.out.panel(s.pad()), apart,
                            gradient + ((size_t)tap * channels + c) * features + 16 * f, out_apart, channels - c,
                            features, lanes);
            };
            for (int channel = 0; channel < 16; channel += 8)
              if (overlap) add.template operator()<8, 3>(channel, -kImages / 2, channels * features);
              else if (vectors == 2) add.template operator()<8, 2>(channel, s.out.panel(s.pad()), 16);
            if (!overlap && vectors == 1) add.template operator()<16, 1>(0, 0, 0);
          }
        }
    }
}

}  // namespace
