// Products of matrices of bfloat16 by the processor's tiles (AMX): eight registers of 16 rows of 64 bytes. One
// instruction adds the product of 16 rows of 32 numbers with 32 rows of 16, the latter in pairs of rows, to 16 rows of
// 16 floats: on one Xeon core 1,900 billion products a second, where convolution_bf16.cc (vdpbf16ps) reaches 100.

#pragma once

#include <immintrin.h>

#include "flat.h"

namespace {

constexpr int kDepth = 32;  // numbers that a step sums over
constexpr int kWords = 256;  // pairs of a tile that is multiplied, floats of one that is summed up in

inline int Steps(int numbers) { return (numbers + kDepth - 1) / kDepth; }

// All eight registers of this thread, of full size, while it lives.
struct Tiles {
  Tiles() {
    static constexpr struct alignas(64) {  // constant: GCC 12 does not know that more than 8 bytes of it are read
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } kShape;
    _tile_loadconfig(&kShape);
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
// every run in whole steps that end in zeros. (The pixels behind a run are multiplied by these, so NaN and infinity in
// one image may make NaN of the next one's first pixels.)
struct Packed {
  std::vector<Run> runs;
  int channels, columns, steps = 0;

  Packed(std::vector<Run> all, int channels, int columns) : runs(std::move(all)), channels(channels), columns(columns) {
    for (const Run& run : runs) steps += Steps(run.count * channels);
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

// visit(strip, panel) for all strips of a line and every second panel. Of a large kernel two panels at a time serve all
// strips, of a small one all panels a strip: 512 to 512 channels of 4x4, forward, 6.4 ms, the other way 8.2.
template <class F>
inline void ForStrips(const Flat& flat, const Packed& packed, F visit) {
  constexpr size_t kSmall = 64 << 10;  // words
  if (packed.size() > kSmall)
    for (int panel = 0; panel < packed.panels(); panel += 2)
      for (int at = 0; at < flat.line(); at += kStrip) visit(at, panel);
  else
    for (int at = 0; at < flat.line(); at += kStrip)
      for (int panel = 0; panel < packed.panels(); panel += 2) visit(at, panel);
}

// Between what is written and tiles that are loaded from it, of which GCC 12 does not know.
inline void Written() { asm volatile("" ::: "memory"); }

inline void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums of a strip of pixels for two panels from `panel` on, or the last: [pixel][panel][16].
inline void Multiply(const Packed& packed, int panel, const uint32_t* words, const BFloat16* z, size_t plane,
                     float* sums) {
  Written();
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

}  // namespace
