// Products of matrices of bfloat16 by the processor's tiles (AMX): eight registers of 16 rows of 64 bytes. One
// instruction adds the product of 16 rows of 32 numbers with 32 rows of 16, the latter in pairs of rows, to 16 rows of
// 16 floats: on one Xeon core 1,600 billion products a second, of pairs (vdpbf16ps) 39.

#pragma once

#include <immintrin.h>

#include "flat.h"

namespace {

using Bits16 = Bits<Vec16>;
using Half16 = Half<Vec16>;

constexpr int kDepth = 32;       // numbers that a step sums over
constexpr int kOperand = 512;    // numbers of a tile
constexpr int kWords = 16 * 16;  // the same in pairs, and floats of a tile

inline int Steps(int numbers) { return (numbers + kDepth - 1) / kDepth; }

inline Bits16 Pair(Half16 low, Half16 high) {
  return __builtin_convertvector(low, Bits16) | __builtin_convertvector(high, Bits16) << 16;
}

// All eight registers of this thread, of full size, while it lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// Sixteen vectors of words, rows and columns exchanged.
inline void Transpose(Bits16 (&v)[16]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    Bits16 next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      next[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = next[i];
  }
}

// What a line of pixels is multiplied by, for a result of `columns` numbers: as [panel of 16][step][pair][column],
// every run in whole steps that end in zeros.
struct Packed {
  std::vector<Run> runs;
  int channels, columns, steps = 0;

  Packed(std::vector<Run> runs, int channels, int columns) : runs(std::move(runs)), channels(channels), columns(columns) {
    for (const Run& run : this->runs) steps += Steps(run.count * channels);
  }
  int panels() const { return (columns + 15) / 16; }
  size_t size() const { return (size_t)panels() * steps * kWords; }  // words

  // fill(run, tap of it, panel, to): `channels` / 2 vectors of pairs.
  template <class F>
  void Fill(ffi::ThreadPool& pool, uint32_t* to, F fill) const {
    ParallelFor(pool, panels(), [=, this](int panel) {
      uint32_t* at = to + (size_t)panel * steps * kWords;
      for (const Run& run : runs) {
        int vectors = run.count * channels / 2, whole = Steps(run.count * channels) * 16;
        for (int tap = 0; tap < run.count; tap++) fill(run, tap, panel, at + (size_t)tap * channels / 2 * 16);
        std::fill(at + vectors * 16, at + whole * 16, 0);
        at += whole * 16;
      }
    });
  }
};

// From a kernel [row, column, channel, feature], whose channels are summed over.
void Pack(ffi::ThreadPool& pool, const Packed& packed, const Flat& flat, const float* kernel, uint32_t* to) {
  int channels = flat.in.channels, features = flat.out.channels;
  packed.Fill(pool, to, [=](const Run& run, int tap, int panel, uint32_t* to) {
    const float* from =
        kernel + ((size_t)run.row * flat.size + run.column + tap * flat.stride) * channels * features + 16 * panel;
    for (int c = 0; c < channels; c += 2, from += 2 * features, to += 16) {
      Bits16 pair = Pair(Rounded(LoadSome<Vec16>(from, features - 16 * panel)),
                         Rounded(LoadSome<Vec16>(from + features, features - 16 * panel)));
      std::memcpy(to, &pair, sizeof(pair));
    }
  });
}

// From the same kernel, whose features are summed over, taps in reverse.
void PackTurned(ffi::ThreadPool& pool, const Packed& packed, const Flat& flat, const float* kernel, uint32_t* to) {
  int channels = flat.in.channels, features = flat.out.channels;
  packed.Fill(pool, to, [=](const Run& run, int tap, int panel, uint32_t* to) {
    size_t at = (size_t)run.row * flat.size + run.column + (run.count - 1 - tap) * flat.stride;
    const float* from = kernel + (at * channels + 16 * panel) * features;
    int rows = std::min(16, channels - 16 * panel);
    for (int f = 0; f < features; f += 32, to += 16 * 16) {
      Bits16 words[16] = {};
      for (int r = 0; r < rows; r++) {
        Half16 halves[2] = {Rounded(LoadSome<Vec16>(from + (size_t)r * features + f, features - f)), {}};
        if (f + 16 < features)
          halves[1] = Rounded(LoadSome<Vec16>(from + (size_t)r * features + f + 16, features - f - 16));
        std::memcpy(&words[r], halves, sizeof(halves));
      }
      Transpose(words);
      std::memcpy(to, words, std::min(16, (features - f) / 2) * sizeof(words[0]));
    }
  });
}

inline void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums of a strip of pixels for two panels from `panel` on, or the last: [pixel][panel][16].
inline void Multiply(const Packed& packed, int panel, const uint32_t* words, const BFloat16* z, size_t plane,
                     float* sums) {
  asm volatile("" ::: "memory");  // what was written is what the tiles load: GCC 12 does not know it
  size_t row = packed.channels * sizeof(BFloat16), line = packed.channels * 16;  // 16 pixels further
  const uint32_t* b = words + (size_t)panel * packed.steps * kWords;
  auto steps = [&](const BFloat16* z, auto step) {
    const uint32_t* at = b;
    for (const Run& run : packed.runs) {
      const BFloat16* a = z + run.plane * plane + run.offset * packed.channels;
      for (int k = Steps(run.count * packed.channels); k > 0; k--, a += kDepth, at += kWords) step(a, at);
    }
  };
  if (panel + 1 == packed.panels()) {
    ZeroSums();
    steps(z, [=](const BFloat16* a, const uint32_t* b) {
      _tile_loadd(4, b, 64);
      _tile_loadd(5, a, row);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, a + line, row);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, a + 2 * line, row);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, a + 3 * line, row);
      _tile_dpbf16ps(3, 5, 4);
    });
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kWords, 64);
    _tile_stored(2, sums + 2 * kWords, 64);
    _tile_stored(3, sums + 3 * kWords, 64);
    return;
  }
  const size_t next = (size_t)packed.steps * kWords;
  for (int half = 0; half < 2; half++, z += 2 * line, sums += 4 * kWords) {
    ZeroSums();
    steps(z, [=](const BFloat16* a, const uint32_t* b) {
      _tile_loadd(4, a, row);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + next, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + line, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    });
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 2 * kWords, 128);
    _tile_stored(3, sums + 2 * kWords + 16, 128);
  }
}

// From [pixel][feature] to [feature][pixel], rows `apart` numbers apart; the last features' panel ends in rows of zeros.
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
// pairs of pixels that begin with an even one, and for 3x3 and larger kernels, in pairs that begin with an odd one; so
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
  asm volatile("" ::: "memory");  // as above
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
