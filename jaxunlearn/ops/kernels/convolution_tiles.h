// Direct convolution of one padded image, in tiles that stay in registers, and the grids that its input gradient is
// made of (convolution.cc).

#pragma once

#include "images.h"

namespace {

// Accumulators that fit into the registers beside what they are fed with.
#ifdef __AVX512F__
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 12;
#endif

struct Shape {
  int batch, height, width, channels, size, stride, out_height, out_width, features;

  Shape(const Array& x, const ffi::Span<const int64_t>& out, int64_t size, int64_t stride)
      : batch(x.dimensions()[0]), height(x.dimensions()[1]), width(x.dimensions()[2]), channels(x.dimensions()[3]),
        size(size), stride(stride), out_height(out[1]), out_width(out[2]), features(out[3]) {}

  int pad() const { return size / 2; }
  size_t row() const { return (size_t)(width + 2 * pad()) * channels; }  // of the padded image
  size_t image() const { return (size_t)height * width * channels; }
  size_t padded() const { return (size_t)(height + 2 * pad()) * row(); }
  size_t padded_out() const { return (size_t)(out_height + 2 * pad()) * (out_width + 2 * pad()) * features; }
  size_t out() const { return (size_t)out_height * out_width * features; }
  size_t kernel() const { return (size_t)size * size * channels * features; }
};

// A grid of windows of `rows` times `taps` floats, and of pixels that their products with a kernel go to. All else is
// distances: between rows of a window, windows side by side and one below the other, pixels likewise.
struct Grid {
  int height, width, features, rows, taps;
  size_t row, along, down, out_along, out_down;
};

// P pixels of N vectors of features.
template <class V, int P, int N>
inline void ConvolveTile(const Grid& s, const float* x, const float* kernel, float* out) {
  constexpr int kLanes = kLanesOf<V>;
  V sum[P][N] = {};
  for (int i = 0; i < s.rows; i++, x += s.row) {
    for (int t = 0; t < s.taps; t++, kernel += s.features) {
      V k[N];
      for (int n = 0; n < N; n++) k[n] = Load<V>(kernel + n * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        float value = x[p * s.along + t];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[p][n] += value * k[n];
      }
    }
  }
  for (int p = 0; p < P; p++)
    for (int n = 0; n < N; n++) Store(out + p * s.out_along + n * kLanes, sum[p][n]);
}

// P pixels of one vector of features where windows of three pixels overlap: every float of the image that is read
// serves three of them. With one vector, the tile above must read one for each multiplication.
template <class V, int P>
inline void ConvolveOverlapping(const Grid& s, const float* x, const float* kernel, float* out) {
  V sum[P] = {};
  size_t channels = s.along, tap = channels * s.features;
  for (int i = 0; i < s.rows; i++, x += s.row, kernel += 2 * tap) {
    for (size_t c = 0; c < channels; c++, kernel += s.features) {
      V k[3] = {Load<V>(kernel), Load<V>(kernel + tap), Load<V>(kernel + 2 * tap)};
#pragma GCC unroll 18
      for (int q = 0; q < P + 2; q++) {
        V value = x[q * channels + c] - V{};
        if (q < P) sum[q] += value * k[0];
        if (q >= 1 && q <= P) sum[q - 1] += value * k[1];
        if (q >= 2) sum[q - 2] += value * k[2];
      }
    }
  }
  for (int p = 0; p < P; p++) Store(out + p * s.out_along, sum[p]);
}

template <class V, int N>
void ConvolveColumns(const Grid& s, const float* x, const float* kernel, float* out) {
  for (int y = 0; y < s.height; y++, x += s.down, out += s.out_down) {
    int p = 0;
    auto tiles = [&]<int P>() {
      for (; p + P <= s.width; p += P) {
        const float* from = x + p * s.along;
        if (N == 1 && P > 4 && s.taps == 3 * (int)s.along)
          ConvolveOverlapping<V, P>(s, from, kernel, out + p * s.out_along);
        else
          ConvolveTile<V, P, N>(s, from, kernel, out + p * s.out_along);
      }
    };
    tiles.template operator()<kAccumulators / N>();
    tiles.template operator()<4>();
    tiles.template operator()<1>();
  }
}

// Runs columns<V, N>(first feature) for blocks of N vectors V that cover all features, a multiple of 8.
template <class F>
void ForFeatures(int features, F columns) {
  int f = 0;
  for (; f + 2 * kLanes <= features; f += 2 * kLanes) columns.template operator()<Wide, 2>(f);
  for (; f + kLanes <= features; f += kLanes) columns.template operator()<Wide, 1>(f);
  for (; f + 8 <= features; f += 8) columns.template operator()<Vec8, 1>(f);
}

void ConvolveGrid(const Grid& grid, const float* x, const float* kernel, float* out) {
  ForFeatures(grid.features, [&]<class V, int N>(int f) { ConvolveColumns<V, N>(grid, x, kernel + f, out + f); });
}

// `image` with `pad` pixels of zeros on every side. write(row, pixels) makes a row of the image.
template <class F>
void Pad(int height, int width, int channels, int pad, float* padded, F write) {
  size_t margin = (size_t)pad * channels, row = (size_t)width * channels + 2 * margin;
  std::fill_n(padded, pad * row, 0.f);
  std::fill_n(padded + (pad + height) * row, pad * row, 0.f);
  for (int y = 0; y < height; y++) {
    float* to = padded + (pad + y) * row;
    std::fill_n(to, margin, 0.f);
    write(y, to + margin);
    std::fill_n(to + row - margin, margin, 0.f);
  }
}

Grid ForwardGrid(const Shape& s) {
  return {s.out_height, s.out_width, s.features, s.size, s.size * s.channels, s.row(), (size_t)s.stride * s.channels,
          s.stride * s.row(), (size_t)s.features, (size_t)s.out_width * s.features};
}

// The input gradient is the convolution of the output's, its pixels spread out by `stride`, with the kernel turned by
// half a circle. Pixels whose coordinates are alike modulo `stride` see the same taps: each such phase is a convolution
// of the output's gradient as it is.
struct Phase {
  Grid grid;
  size_t from, to;  // of its first window and pixel
  std::vector<float> kernel;
};

struct Along {
  // Taps, and the pixel of the gradient that the first meets, from the input's divided by stride.
  int first, count, shift;
  Along(int phase, int size, int stride) {
    int before = size - 1 - size / 2;
    first = ((before - phase) % stride + stride) % stride;
    count = (size - first + stride - 1) / stride;
    shift = (phase + first - before) / stride;
  }
};

std::vector<Phase> Phases(const Shape& s, const float* kernel) {
  std::vector<Phase> phases;
  size_t row = (size_t)(s.out_width + 2 * s.pad()) * s.features;  // of the padded gradient
  for (int a = 0; a < std::min(s.stride, s.height); a++)
    for (int b = 0; b < std::min(s.stride, s.width); b++) {
      Along down(a, s.size, s.stride), along(b, s.size, s.stride);
      Grid grid{(s.height - a + s.stride - 1) / s.stride, (s.width - b + s.stride - 1) / s.stride, s.channels,
                down.count, along.count * s.features, row, (size_t)s.features, row, (size_t)s.stride * s.channels,
                (size_t)s.stride * s.width * s.channels};
      Phase phase{grid, (s.pad() + down.shift) * row + (size_t)(s.pad() + along.shift) * s.features,
                  ((size_t)a * s.width + b) * s.channels, {}};
      for (int i = down.first; i < s.size; i += s.stride)
        for (int j = along.first; j < s.size; j += s.stride) {
          const float* tap = kernel + (size_t)((s.size - 1 - i) * s.size + s.size - 1 - j) * s.channels * s.features;
          for (int f = 0; f < s.features; f++)
            for (int c = 0; c < s.channels; c++) phase.kernel.push_back(tap[(size_t)c * s.features + f]);
        }
      phases.push_back(std::move(phase));
    }
  return phases;
}

}  // namespace
