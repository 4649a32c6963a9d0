// The gradient of a kernel by tiles: for each tap and sixteen of its channels a product of matrices, of the result's
// gradient [features, pixels] and the input [pixels, channels].

#pragma once

#include "tiles.h"

namespace {

// From [pixel][feature] to [feature][pixel], rows `apart` numbers apart; the last panel ends in rows of zeros.
void TransposePixels(const BFloat16* g, int pixels, int features, size_t apart, BFloat16* to) {
  for (int f = 0; f < features; f += 16)
    for (int p = 0; p < pixels; p += kDepth) {
      Bits16 words[16];
      for (int i = 0; i < 16; i++) {
        const BFloat16* from = g + (size_t)(p + 2 * i) * features + f;
        words[i] = Pair(LoadHalves<Vec16>(from, features - f), LoadHalves<Vec16>(from + features, features - f));
      }
      Transpose(words);
      for (int i = 0; i < 16; i++) std::memcpy(to + (f + i) * apart + p, &words[i], sizeof(words[i]));
    }
}

// From [pixel][channel] to pairs of pixels, [panel of 16][pair][channel], panels `apart` words apart.
void PairPixels(const BFloat16* z, int pixels, int channels, size_t apart, uint32_t* to) {
  for (int c = 0; c < channels; c += 16, to += apart)
    for (int p = 0; p + 1 < pixels; p += 2) {
      const BFloat16* from = z + (size_t)p * channels + c;
      Bits16 pair = Pair(LoadHalves<Vec16>(from, channels - c), LoadHalves<Vec16>(from + channels, channels - c));
      std::memcpy(to + (size_t)p / 2 * 16, &pair, sizeof(pair));
    }
}

// How a block's input and its result's gradient lie for the gradient of the kernel, a sum over pixels: the input in
// pairs of pixels that begin with an even one, and where taps may lie at odd distances, with an odd one too; so
// that whatever a tap's distance, tiles begin where lines of the cache do.
struct Turned {
  const Flat& flat;

  int channels() const { return Padded(flat.in.channels); }
  int features() const { return Padded(flat.out.channels); }
  int parities() const { return flat.reach > 0 ? 2 : 1; }
  size_t panel() const { return (size_t)(flat.kept() + 1) / 2 * 16; }  // words
  size_t paired() const { return channels() / 16 * panel(); }          // of a plane and a parity
  size_t input() const { return flat.planes() * parities() * paired(); }
  size_t apart() const { return (size_t)(flat.line() / kDepth | 1) * kDepth; }  // an odd number of lines
  size_t gradient() const { return features() * apart(); }
  size_t bytes() const { return input() * sizeof(uint32_t) + gradient() * sizeof(BFloat16); }
  size_t kernel() const { return (size_t)flat.size * flat.size * channels() * features(); }
  int parts() const { return flat.size * flat.size * channels() / 16; }  // of sixteen channels of a tap

  void Arrange(const BFloat16* z, uint32_t* to) const {
    for (int plane = 0; plane < flat.planes(); plane++, z += (size_t)flat.kept() * flat.in.channels)
      for (int parity = 0; parity < parities(); parity++, to += paired())
        PairPixels(z + parity * flat.in.channels, flat.kept() - parity, flat.in.channels, panel(), to);
  }

  // Where a part's channels begin, of the first pixel.
  size_t at(int part) const {
    int panels = channels() / 16, tap = part / panels, i = tap / flat.size, j = tap % flat.size, s = flat.stride;
    int offset = i / s * flat.width + j / s;
    return ((i % s * s + j % s) * parities() + offset % 2) * paired() + part % panels * panel() + offset / 2 * 16;
  }
};

// Adds a block's gradient of `count` parts of the kernel from `first` on, [part][feature][channel].
void AddKernelGradient(const Turned& turned, int first, int count, const uint32_t* z, const BFloat16* g,
                       float* gradient) {
  Written();
  const size_t row = turned.apart() * sizeof(*g);
  const int steps = turned.flat.line() / kDepth, panels = turned.features() / 16;
  float spare[kWords];  // of parts that are behind the last
  auto products = [&](const BFloat16* a, auto step) {
    for (int k = 0; k < steps; k++) step(a + k * kDepth, (size_t)k * kWords);
  };
  for (int panel = 0; panel < panels; panel += 2) {
    const bool two = panel + 1 < panels;
    const BFloat16* a = g + panel * 16 * turned.apart();
    for (int part = 0; part < count; part += two ? 2 : 4) {
      const uint32_t* b[4];
      float* to[4];
      for (int i = 0; i < 4; i++) {
        int which = part + (two ? i / 2 : i);
        bool there = which < count;
        b[two ? i / 2 : i] = z + turned.at(first + (there ? which : part));
        to[i] = there ? gradient + ((size_t)which * turned.features() + (panel + (two ? i % 2 : 0)) * 16) * 16 : spare;
      }
      _tile_loadd(0, to[0], 64);
      _tile_loadd(1, to[1], 64);
      _tile_loadd(2, to[2], 64);
      _tile_loadd(3, to[3], 64);
      if (two) {
        const size_t next = 16 * turned.apart();
        products(a, [=](const BFloat16* a, size_t at) {
          _tile_loadd(4, a, row);
          _tile_loadd(6, b[0] + at, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, a + next, row);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(7, b[1] + at, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        });
      } else {
        products(a, [=](const BFloat16* a, size_t at) {
          _tile_loadd(4, a, row);
          _tile_loadd(5, b[0] + at, 64);
          _tile_dpbf16ps(0, 4, 5);
          _tile_loadd(6, b[1] + at, 64);
          _tile_dpbf16ps(1, 4, 6);
          _tile_loadd(7, b[2] + at, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_loadd(5, b[3] + at, 64);
          _tile_dpbf16ps(3, 4, 5);
        });
      }
      _tile_stored(0, to[0], 64);
      _tile_stored(1, to[1], 64);
      _tile_stored(2, to[2], 64);
      _tile_stored(3, to[3], 64);
    }
  }
}

// The gradient of a kernel [tap][channel][feature] from its parts.
void Unpack(ffi::ThreadPool& pool, const Turned& turned, const float* parts, float* to) {
  int channels = turned.flat.in.channels, features = turned.flat.out.channels, panels = turned.channels() / 16;
  ParallelFor(pool, turned.parts(), [=, &turned](int part) {
    const float* from = parts + (size_t)part * turned.features() * 16;
    int first = part % panels * 16, rows = std::min(16, channels - first);
    float* at = to + ((size_t)(part / panels) * channels + first) * features;
    for (int f = 0; f < features; f += 16, from += kWords) {
      Bits16 words[16];
      std::memcpy(words, from, sizeof(words));
      Transpose(words);
      for (int r = 0; r < rows; r++) StoreSome(at + (size_t)r * features + f, (Vec16)words[r], features - f);
    }
  });
}

}  // namespace
