// Pairs of bfloat16, and blocks of eight images in a thread's scratch that are made of them.
//
// Eight images lie side by side, pixel by pixel. Products of pairs (vdpbf16ps) take pairs of channels, laid out as
// [row, column, pair, image]; for a kernel's gradient, a sum over pixels, pairs of images, laid out as [panel of 16
// channels, row, column, pair, channel].

#pragma once

#include "images.h"

namespace {

constexpr int kImages = 8;

typedef uint32_t Eight __attribute__((vector_size(32)));  // a pair of channels of every image

// sum + a * b for pairs of bfloat16.
inline Vec16 Dot(Vec16 sum, Bits16 a, Bits16 b) {
#ifdef __AVX512BF16__
  return (Vec16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec16)(a << 16) * (Vec16)(b << 16);
  return sum + (Vec16)(a & 0xffff0000) * (Vec16)(b & 0xffff0000);
#endif
}

inline Bits16 Broadcast(uint32_t pair) { return pair - Bits16{}; }

// What a convolution reads or writes: of one image, or of a block of eight in scratch.
struct Images {
  int height, width, channels;

  int pairs() const { return (channels + 1) / 2; }
  int panels() const { return (channels + 15) / 16; }
  size_t image() const { return (size_t)height * width * channels; }
  // Of a block, padded on the left and right: pairs of channels, and for 16 channels, pairs of images.
  size_t block(int pad) const { return (size_t)height * (width + 2 * pad) * pairs(); }
  size_t panel(int pad) const { return (size_t)height * (width + 2 * pad) * kImages / 2; }
};

// Eight pairs of channels of eight images, from [image][pair] to [pair][image].
inline void Transpose(Eight (&v)[8]) {
#pragma GCC unroll 3
  for (int round = 0; round < 3; round++) {
    Eight next[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      next[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = next[i];
  }
}

// Lays out a block of images with `pad` columns of zeros on both sides, `plain` by pairs of channels and `paired` by
// pairs of images; either may be null. value(offset, channel, count): the numbers of up to sixteen channels.
template <class V>
void Arrange(const Images& s, int images, int pad, Eight* plain, Bits16* paired, V value) {
  size_t margin = pad * s.pairs();
  auto row = [&]<bool kWhole>(int y) {
    for (int x = 0; x < s.width; x++)
      for (int c = 0; c < s.channels; c += 16) {
        size_t pixel = (size_t)y * s.width + x;
        int count = kWhole ? 16 : s.channels - c;
        Half16 halves[kImages];
#pragma GCC unroll 8
        for (int b = 0; b < kImages; b++)
          if (kWhole || b < images) halves[b] = Rounded(value(b * s.image() + pixel * s.channels + c, c, count));
          else halves[b] = Half16{};
        if (paired)
#pragma GCC unroll 4
          for (int b = 0; b < kImages / 2; b++)
            paired[c / 16 * s.panel(pad) + (pixel + (2 * y + 1) * pad) * (kImages / 2) + b] =
                Pair(halves[2 * b], halves[2 * b + 1]);
        if (plain) {
          Eight pairs[8];
#pragma GCC unroll 8
          for (int b = 0; b < kImages; b++) pairs[b] = (Eight)halves[b];
          Transpose(pairs);
          int most = kWhole ? 8 : std::min(8, s.pairs() - c / 2);
          for (int i = 0; i < most; i++) *plain++ = pairs[i];
        }
      }
  };
  bool whole = images == kImages && s.channels % 16 == 0;
  for (int y = 0; y < s.height; y++) {
    for (int n = 0; paired && n < s.panels(); n++)
      for (int x : {0, pad + s.width})
        std::fill_n(paired + n * s.panel(pad) + ((size_t)y * (s.width + 2 * pad) + x) * (kImages / 2),
                    pad * (kImages / 2), Bits16{});
    if (plain) plain = std::fill_n(plain, margin, Eight{});
    if (whole) row.template operator()<true>(y);
    else row.template operator()<false>(y);
    if (plain) plain = std::fill_n(plain, margin, Eight{});
  }
}

}  // namespace
