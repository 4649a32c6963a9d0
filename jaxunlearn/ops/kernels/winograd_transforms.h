// The transforms of Winograd's convolution (winograd.cc), of a chunk of tiles or of a kernel.

#pragma once

#include <array>
#include <bit>

#include "winograd_products.h"

namespace winograd {

template <int P>
using Parts = std::array<Wide, P>;

// Along one direction, P = 4: F(2, 3). P = 3: the same for an image of two pixels, where only two of four pixels under
// a tile are not padding: nine positions do instead of sixteen.

template <int P>
inline Parts<P> InputParts(Wide d0, Wide d1, Wide d2, Wide d3) {  // B^T
  if constexpr (P == 4) return {d0 - d2, d1 + d2, d2 - d1, d1 - d3};
  else return {d1, d1 + d2, d2};
}

template <int P>
inline Parts<P> KernelParts(Wide k0, Wide k1, Wide k2) {  // G
  if constexpr (P == 4) return {k0, (k0 + k2 + k1) * 0.5f, (k0 + k2 - k1) * 0.5f, k2};
  else return {k0 - k1, k1, k2 - k1};
}

template <int P>
inline Parts<2> OutputPixels(const Parts<P>& m) {  // A^T
  if constexpr (P == 4) return {m[0] + m[1] + m[2], m[1] - m[2] - m[3]};
  else return {m[1] + m[2], m[0] + m[1]};
}

template <int P>
inline Parts<P> PixelParts(Wide z0, Wide z1) {  // A
  if constexpr (P == 4) return {z0, z0 + z1, z0 - z1, -z1};
  else return {z1, z0 + z1, z0};
}

template <int P>
inline Parts<3> KernelGradient(const Parts<P>& u) {  // G^T
  if constexpr (P == 4) return {u[0] + (u[1] + u[2]) * 0.5f, (u[1] - u[2]) * 0.5f, (u[1] + u[2]) * 0.5f + u[3]};
  else return {u[0], u[1] - u[0] - u[2], u[2]};
}

// Tiles of a chunk, or the next number that makes whole rows. 32: 3 to 8% slower; 96: as fast in most layers, 9% slower
// in the backward pass of 256 channels.
constexpr int kTiles = 48;

// Rows of tiles are numbered through all images.
struct Tiling {
  int batch, height, width, down, along, chunk, chunks;

  explicit Tiling(const Array& x)
      : batch(x.dimensions()[0]), height(x.dimensions()[1]), width(x.dimensions()[2]), down((height + 1) / 2),
        along((width + 1) / 2) {
    int rows = batch * down;
    chunk = std::max(1, kTiles / along);
    unsigned few = (rows + chunk - 1) / chunk;  // to be shared out evenly
    if (few < 32) chunk = (rows + std::bit_floor(few) - 1) / std::bit_floor(few);
    chunks = (rows + chunk - 1) / chunk;
  }

  int begin(int chunk) const { return chunk * this->chunk; }
  int end(int chunk) const { return std::min(begin(chunk + 1), batch * down); }
  int tiles(int chunk) const { return tiles(chunk, chunk + 1); }
  int tiles(int from, int to) const { return (end(to - 1) - begin(from)) * along; }
  size_t pixel(int row) const { return ((size_t)(row / down) * height + row % down * 2) * width; }  // its first
  bool lower(int row) const { return row % down * 2 + 1 < height; }  // whether its tiles have two rows of pixels
  size_t first(int chunk) const { return pixel(begin(chunk)); }
  size_t pixels(int chunk) const {
    return end(chunk) < batch * down ? first(chunk + 1) - first(chunk) : (size_t)batch * height * width - first(chunk);
  }
};

// B^T d B of a chunk's tiles. fill(pixel, count, to) makes `count` pixels' channels.
template <int P, class F>
void TransformInput(const Tiling& t, const Layout& layout, int chunk, float* scratch, float* out, F fill) {
  int channels = layout.channels;
  size_t size = (size_t)(2 * t.along + 2) * channels;
  float* rows[4] = {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size};
  auto read = [&](int row, int from) {
    for (int i = from; i < 4; i++) {
      int y = row % t.down * 2 - 1 + i;
      if (y < 0 || y >= t.height) {
        std::fill_n(rows[i], size, 0.f);
        continue;
      }
      size_t end = (size_t)(t.width + 1) * channels;
      std::fill_n(rows[i], channels, 0.f);
      fill(((size_t)(row / t.down) * t.height + y) * t.width, t.width, rows[i] + channels);
      std::fill_n(rows[i] + end, size - end, 0.f);
    }
  };
  for (int row = t.begin(chunk); row < t.end(chunk); row++, out += t.along * layout.row) {
    bool follows = row > t.begin(chunk) && row % t.down > 0;
    if (follows) {
      std::swap(rows[0], rows[2]);
      std::swap(rows[1], rows[3]);
    }
    read(row, follows ? 2 : 0);
    for (int c = 0; c < channels; c += kLanes) {
      auto column = [&](int x) {
        size_t at = (size_t)x * channels + c;
        return InputParts<P>(Load<Wide>(rows[0] + at), Load<Wide>(rows[1] + at), Load<Wide>(rows[2] + at),
                             Load<Wide>(rows[3] + at));
      };
      Parts<P> d0 = column(0), d1 = column(1);
      float* to = out + c;
      for (int x = 0; x < t.along; x++, to += layout.row) {
        Parts<P> d2 = column(2 * x + 2), d3 = column(2 * x + 3);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
          Parts<P> parts = InputParts<P>(d0[i], d1[i], d2[i], d3[i]);
#pragma GCC unroll 4
          for (int j = 0; j < P; j++) Store(to + (i * P + j) * layout.position, parts[j]);
        }
        d0 = d2;
        d1 = d3;
      }
    }
  }
}

// A z A^T of a chunk's tiles.
template <int P>
void TransformPixels(const Tiling& t, const Layout& layout, int chunk, const Reading& read, const float* x,
                     float* out) {
  int channels = layout.channels;
  size_t below = (size_t)t.width * channels;
  for (int row = t.begin(chunk); row < t.end(chunk); row++) {
    const float* from = x + t.pixel(row) * channels;
    for (int p = 0; p < t.along; p++, from += 2 * channels, out += layout.row) {
      bool right = 2 * p + 1 < t.width, lower = t.lower(row);
      for (int c = 0; c < channels; c += kLanes) {
        Normal<Wide> normal = read.At(c);
        auto pixel = [&](size_t at) { return normal(Load<Wide>(from + at + c)); };
        Wide none = {};
        Parts<P> left = PixelParts<P>(pixel(0), lower ? pixel(below) : none), other{};
        if (right) other = PixelParts<P>(pixel(channels), lower ? pixel(below + channels) : none);
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) {
          Parts<P> parts = PixelParts<P>(left[i], other[i]);
#pragma GCC unroll 4
          for (int j = 0; j < P; j++) Store(out + (i * P + j) * layout.position + c, parts[j]);
        }
      }
    }
  }
}

// A^T m A of a chunk's tiles, of a vector of features: put(pixel, output) for every pixel of the image.
template <int P, class F>
inline void TransformOutput(const Tiling& t, int chunk, const float* m, size_t m_row, size_t m_position, F put) {
  for (int row = t.begin(chunk); row < t.end(chunk); row++) {
    size_t pixel = t.pixel(row);
    bool lower = t.lower(row);
    for (int x = 0; x < t.width; x += 2, pixel += 2, m += m_row) {
      Parts<P> upper_parts, lower_parts;
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) {
        Parts<P> column;
#pragma GCC unroll 4
        for (int i = 0; i < P; i++) column[i] = Load<Wide>(m + (i * P + j) * m_position);
        Parts<2> pixels = OutputPixels<P>(column);
        upper_parts[j] = pixels[0];
        lower_parts[j] = pixels[1];
      }
      Parts<2> top = OutputPixels<P>(upper_parts), bottom = OutputPixels<P>(lower_parts);
      put(pixel, top[0]);
      if (x + 1 < t.width) put(pixel + 1, top[1]);
      if (!lower) continue;
      put(pixel + t.width, bottom[0]);
      if (x + 1 < t.width) put(pixel + t.width + 1, bottom[1]);
    }
  }
}

// A square matrix: swaps the blocks beside the diagonal, of 1, then 2, 4, 8.
inline void Transpose(Wide* rows) {
  typedef int Order __attribute__((vector_size(sizeof(Wide))));
#pragma GCC unroll 4
  for (int size = 1; size < kLanes; size *= 2) {
    Order upper, lower;
    for (int i = 0; i < kLanes; i++) {
      upper[i] = i & size ? kLanes + i - size : i;
      lower[i] = i & size ? kLanes + i : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      if (i & size) continue;
      Wide a = rows[i], b = rows[i + size];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
}

// Where a position's transformed kernel begins, of a matrix [depth, width] in panels [width / kPanel][depth][kPanel].
inline size_t KernelPosition(int depth, int width) { return (size_t)depth * width + 16; }

// G k G^T. `kTurned`: of the kernel turned by half a circle, channels and features exchanged.
template <int P, bool kTurned>
void TransformKernel(ffi::ThreadPool& pool, const float* kernel, int channels, int features, float* out) {
  int depth = kTurned ? features : channels, width = kTurned ? channels : features;
  size_t position = KernelPosition(depth, width);
  ParallelFor(pool, channels / kLanes, [=](int block) {
    int c = block * kLanes;
    for (int f = 0; f < features; f += kLanes) {
      Wide taps[9][kLanes];
      for (int tap = 0; tap < 9; tap++) {
        Wide* rows = taps[kTurned ? 8 - tap : tap];
        const float* from = kernel + ((size_t)tap * channels + c) * features + f;
        for (int r = 0; r < kLanes; r++, from += features) {
          __builtin_prefetch(from + 32);  // more streams than the CPU follows by itself: 2% of 512 channels of 4x4
          rows[r] = Load<Wide>(from);
        }
        if (kTurned) Transpose(rows);
      }
      int d = kTurned ? f : c, w = kTurned ? c : f;
      int panel = w / kPanel * kPanel, row = std::min(kPanel, width - panel);
      float* to = out + (size_t)panel * depth + d * row + w - panel;
      for (int r = 0; r < kLanes; r++, to += row) {
        Parts<P> columns[3];
        for (int j = 0; j < 3; j++) columns[j] = KernelParts<P>(taps[j][r], taps[3 + j][r], taps[6 + j][r]);
        for (int i = 0; i < P; i++) {
          Parts<P> parts = KernelParts<P>(columns[0][i], columns[1][i], columns[2][i]);
          for (int j = 0; j < P; j++) Store(to + (i * P + j) * position, parts[j]);
        }
      }
    }
  });
}

// G^T u G, turned by half a circle, of `groups` sums [channels, features] for each position, which are added up.
template <int P>
void TransformKernelGradient(ffi::ThreadPool& pool, const float* sums, int groups, size_t position, int channels,
                             int features, float* out) {
  ParallelFor(pool, channels, [=](int c) {
    for (int f = 0; f < features; f += kLanes) {
      size_t at = (size_t)c * features + f;
      Parts<P> columns[P], rows[3];
      for (int i = 0; i < P; i++)
        for (int j = 0; j < P; j++) {
          Wide sum = {};
          for (int group = 0; group < groups; group++)
            sum += Load<Wide>(sums + ((group * P + i) * P + j) * position + at);
          columns[j][i] = sum;
        }
      for (int j = 0; j < P; j++) {
        Parts<3> taps = KernelGradient<P>(columns[j]);
        for (int i = 0; i < 3; i++) rows[i][j] = taps[i];
      }
      for (int i = 0; i < 3; i++) {
        Parts<3> taps = KernelGradient<P>(rows[i]);
        for (int j = 0; j < 3; j++) Store(out + (8 - (3 * i + j)) * (size_t)channels * features + at, taps[j]);
      }
    }
  });
}

}  // namespace winograd
