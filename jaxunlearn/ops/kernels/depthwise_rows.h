// Rows of depthwise convolutions and of their gradients (depthwise.cc), in the cache by blocks of a vector of channels.

#pragma once

#include "images.h"

namespace {

struct Layer {
  int batch, height, width, channels, size, stride, pad, out_height, out_width, blocks;
  const float* kernel;

  Layer(ffi::Span<const int64_t> in, int64_t stride, Array kernel)
      : batch(in[0]), height(in[1]), width(in[2]), channels(in[3]), size(kernel.dimensions()[0]), stride(stride),
        pad(size / 2), out_height((height + stride - 1) / stride), out_width((width + stride - 1) / stride),
        blocks((channels + kLanes - 1) / kLanes), kernel(kernel.typed_data()) {}

  size_t row() const { return (size_t)width * channels; }
  size_t out_row() const { return (size_t)out_width * channels; }
  double out_pixels() const { return (double)batch * out_height * out_width; }
};

// Rows that sums run along together: few pixels would not repay the loading of taps.
inline int Strip(int width, int height) { return std::clamp(32 / width, 1, height); }

// The latest `slots` rows of an image, by blocks of channels, and zeros on every side.
struct Ring {
  int slots, height, pad;
  size_t row, block;
  std::vector<Wide> memory;

  Ring(const Layer& s, int slots, int height, int width)
      : slots(slots), height(height), pad(s.pad), row(width + 2 * pad), block((slots + 1) * row),
        memory(s.blocks * block) {}

  // Where the row's first pixel lies, of the first block.
  Wide* operator[](int y) { return memory.data() + (y < 0 || y >= height ? slots : y % slots) * row + pad; }
};

// Row `y` of a ring from values(first channel, lanes)(offset), of `width` pixels.
template <class Values>
inline void FillRow(Ring& ring, int y, int width, int channels, Values values) {
  const size_t block = ring.block;
  Wide* pixel = ring[y];
  for (size_t p = 0, end = (size_t)width * channels; p < end; p += channels, pixel++) {
    Wide* to = pixel;
    ForChannels(channels, [=, &to](int c, auto lanes) {
      *to = values(c, lanes)(p + c);
      to += block;
    });
  }
}

// Writes past the cache, which would first read what it is to overwrite.
inline void Stream(void* to, const void* from, size_t bytes) {
#ifdef __AVX512F__
  size_t head = std::min<size_t>(bytes, -(uintptr_t)to % 64), at = head;
  std::memcpy(to, from, head);
  for (; at + 64 <= bytes; at += 64)
    _mm512_stream_si512((__m512i*)((char*)to + at), _mm512_loadu_si512((const char*)from + at));
  std::memcpy((char*)to + at, (const char*)from + at, bytes - at);
#else
  std::memcpy(to, from, bytes);
#endif
}

// What is read next, fetched bit by bit while something is calculated.
struct Next {
  const char* from;
  size_t step;

  Next(const void* from, size_t bytes, size_t steps) : from((const char*)from), step(bytes / steps) {}

  Next Piece(size_t begin) const { Next piece = *this; piece.from += begin * step; return piece; }

  void Fetch() {
    for (size_t at = 0; at < step; at += 64) __builtin_prefetch(from + at);
    from += step;
  }
};

// The moments of the pixels so far: mean and squared deviations from it, per channel.
struct Moments {
  int count;
  float *mean, *squares;
};

// `rows` rows of the output from `oy` on, and their moments: sums of distances from the mean so far, which lies near
// enough for float. K: the kernel's size if it is known, else 0.
template <int K, class E>
void Convolve(const Layer& s, Ring& z, int oy, int rows, E* y, const Next& next, Moments& moments) {
  const int size = K ? K : s.size, stride = s.stride, width = s.out_width, channels = s.channels;
  std::vector<const Wide*> seen(rows * size);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < size; i++) seen[r * size + i] = z[(oy + r) * stride + i - s.pad] - s.pad;
  const Wide* const* from = seen.data();
  const float* kernel = s.kernel;
  float *means = moments.mean, *deviations = moments.squares;
  const size_t block = z.block;
  const float share = 1.f / (moments.count + rows * width);
  ForChannels(channels, [=](int c, auto lanes) {
    Next ahead = next.Piece(c / kLanes * rows * width);
    Wide taps[K * K + 1];
    for (int n = 0; n < K * K; n++) taps[n] = lanes.Get(kernel + (size_t)n * channels + c);
    Wide mean = lanes.Get(means + c), sum = {}, squares = {};
    E* to = y + c;
    for (int r = 0; r < rows; r++) {
      const Wide* row[K + 1];
      for (int i = 0; i < K; i++) row[i] = from[r * K + i] + c / kLanes * block;
      for (int p = 0, at = 0; p < width; p++, at += stride, to += channels) {
        Wide value = {};
        ahead.Fetch();
#pragma GCC unroll 3
        for (int i = 0; i < size; i++)
#pragma GCC unroll 3
          for (int j = 0; j < size; j++) {
            if constexpr (K) value += row[i][at + j] * taps[i * K + j];
            else value += from[r * size + i][c / kLanes * block + at + j] *
                          lanes.Get(kernel + (size_t)(i * size + j) * channels + c);
          }
        lanes.Put(to, value);
        Wide apart = lanes.Get(to) - mean;
        sum += apart;
        squares += apart * apart;
      }
    }
    lanes.Put(means + c, mean + sum * share);
    lanes.Put(deviations + c, lanes.Get(deviations + c) + squares - sum * sum * share);
  });
  moments.count += rows * width;
}

// The taps, of those along one side of the kernel, that meet the input's pixel `at`: every stride-th. The first meets
// the output's pixel `out`, the next the one before.
struct Along {
  int first, count, out;

  Along(int at, const Layer& s)
      : first((at + s.pad) % s.stride), count(std::max(0, (s.size - first + s.stride - 1) / s.stride)),
        out((at + s.pad - first) / s.stride) {}
};

// Sums over pixels: the gradients' of all but the image.
struct Gradients {
  float *kernel, *factor, *bias;
};

// Of `rows` rows of gx from `iy` on every stride-th, and of those every stride-th pixel from `ix` on. R, T: how many
// rows of g and taps of each meet them, or 0, 0. Each value of g that is loaded serves both the gradient of z and the
// kernel's.
template <int R, int T, class E>
void AddGradients(const Layer& s, const Reading& read, Ring& g, int iy, int rows, int ix, const E* x, E* gx,
                  const Next* next, const Gradients& gradients) {
  const int width = s.width, channels = s.channels, stride = s.stride;
  const Along down(iy, s), along(ix, s);
  const int lines = R ? R : down.count, taps = T ? T : along.count;
  std::vector<const Wide*> met;
  for (int r = 0; r < rows; r += stride)
    for (int n = 0; n < lines; n++) met.push_back(g[down.out + r / stride - n] + along.out);
  const Wide* const* from = met.data();
  const float* kernel = s.kernel;
  auto tap = [=, size = s.size](int r, int t) {
    return (size_t)((down.first + r * stride) * size + along.first + t * stride) * channels;
  };
  const size_t block = g.block;
  ForChannels(channels, [=, &read](int c, auto lanes) {
    const size_t pieces = c / kLanes * ((rows + stride - 1) / stride) * ((width - ix + stride - 1) / stride);
    Next a0 = next[0].Piece(pieces), a1 = next[1].Piece(pieces), a2 = next[2].Piece(pieces);
    Wide k[R * T + 1], sum[R * T + 1];
    for (int n = 0; n < R * T; n++) {
      k[n] = lanes.Get(kernel + tap(n / T, n % T) + c);
      sum[n] = lanes.Get(gradients.kernel + tap(n / T, n % T) + c);
    }
    const Normal<Wide> normal = read.At(c);
    Wide gfactor = lanes.Get(gradients.factor + c), gbias = lanes.Get(gradients.bias + c);
    const Wide* const* line = from;
    for (int r = 0; r < rows; r += stride, line += lines) {
      const Wide* row[R + 1];
      for (int n = 0; n < R; n++) row[n] = line[n] + c / kLanes * block;
      const size_t begin = ((size_t)r * width + ix) * channels + c;
      const E* seen = x + begin;
      E* to = gx + begin;
      for (int p = ix, at = 0; p < width; p += stride, at++, seen += stride * channels, to += stride * channels) {
        a0.Fetch(), a1.Fetch(), a2.Fetch();
        Wide centred = lanes.Get(seen) - normal.mean, z = normal.OfCentred(centred), gz = {};
#pragma GCC unroll 3
        for (int n = 0; n < lines; n++)
#pragma GCC unroll 3
          for (int t = 0; t < taps; t++) {
            if constexpr (R * T > 0) {
              Wide value = row[n][at - t];
              gz += value * k[n * T + t];
              sum[n * T + t] += value * z;
            } else {
              Wide value = line[n][c / kLanes * block + at - t];
              gz += value * lanes.Get(kernel + tap(n, t) + c);
              float* total = gradients.kernel + tap(n, t) + c;
              lanes.Put(total, lanes.Get(total) + value * z);
            }
          }
        Wide kept = normal.Through(gz, centred);
        gbias += kept;
        gfactor += kept * centred;
        lanes.Put(to, kept * normal.factor);
      }
    }
    for (int n = 0; n < R * T; n++) lanes.Put(gradients.kernel + tap(n / T, n % T) + c, sum[n]);
    lanes.Put(gradients.factor + c, gfactor);
    lanes.Put(gradients.bias + c, gbias);
  });
}

}  // namespace
