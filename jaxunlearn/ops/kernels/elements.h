// Vectors of floats, and arrays that they are loaded from and stored to: of float32, or of bfloat16, which is widened
// as it is read and rounded as it is written.

#pragma once

#include <type_traits>

#include "common.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct BFloat16 {
  uint16_t bits;
};

template <class E>
constexpr ffi::DataType kType = ffi::DataType::F32;
template <>
constexpr ffi::DataType kType<BFloat16> = ffi::DataType::BF16;

template <class E>
using ArrayOf = ffi::Buffer<kType<E>>;
template <class E>
using ResultOf = ffi::ResultBuffer<kType<E>>;

// The array's numbers; XLA's own type for bfloat16 is one of 16 bits too.
template <class E, class A>
inline E* Data(A&& array) {
  return reinterpret_cast<E*>(array.typed_data());
}

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

// As wide as the processor's: of wider ones GCC compares number by number, 50 times slower.
#if defined(__AVX512F__)
using Wide = Vec16;
#elif defined(__AVX__)
using Wide = Vec8;
#else
using Wide = Vec4;
#endif

template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(float);
constexpr int kLanes = kLanesOf<Wide>;

// Of as many numbers as V: its bits, and halves of them.
template <class V>
struct Integers {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
  typedef uint16_t Half __attribute__((vector_size(sizeof(V) / 2)));
};
template <class V>
using Bits = typename Integers<V>::Bits;
template <class V>
using Half = typename Integers<V>::Half;

using Bits16 = Bits<Vec16>;
using Half16 = Half<Vec16>;

// Two bfloat16 to a word.
inline Bits16 Pair(Half16 low, Half16 high) {
  return __builtin_convertvector(low, Bits16) | __builtin_convertvector(high, Bits16) << 16;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) {
  uint32_t bits = (uint32_t)value.bits << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

template <class E>
inline E FromFloat(float value) {
  if constexpr (std::is_same_v<E, float>) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return BFloat16{(uint16_t)(bits >> 16 | 0x40)};
    return BFloat16{(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, of two the even one
  }
}

// bfloat16 as floats, and floats as bfloat16.
template <class V>
inline V Widened(Half<V> half) {
#ifdef __AVX512F__
  if constexpr (kLanesOf<V> == 16) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#endif
  return (V)(__builtin_convertvector(half, Bits<V>) << 16);
}

template <class V>
inline Half<V> Rounded(V value) {
#ifdef __AVX512BF16__
  if constexpr (kLanesOf<V> == 16) return (Half<V>)_mm512_cvtneps_pbh((__m512)value);
#endif
  if constexpr (sizeof(V) > sizeof(Wide)) {
    constexpr int kParts = sizeof(V) / sizeof(Wide);
    Wide parts[kParts];
    Half<Wide> halves[kParts];
    std::memcpy(parts, &value, sizeof(value));
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i++) halves[i] = Rounded(parts[i]);
    Half<V> all;
    std::memcpy(&all, halves, sizeof(all));
    return all;
  } else {
    Bits<V> bits = (Bits<V>)value, number = (Bits<V>)(value == value);
    Bits<V> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return __builtin_convertvector((number & rounded) | (~number & quiet), Half<V>);
  }
}

// Numbers in a row, of which nothing is aligned but to its own size. V: a vector, or float.
template <class V, class E>
inline V Load(const E* from) {
  if constexpr (std::is_same_v<V, float>) {
    return ToFloat(*from);
  } else if constexpr (std::is_same_v<E, float>) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
  } else {
    Half<V> half;
    std::memcpy(&half, from, sizeof(half));
    return Widened<V>(half);
  }
}

template <class V, class E>
inline void Store(E* to, V value) {
  if constexpr (std::is_same_v<V, float>) {
    *to = FromFloat<E>(value);
  } else if constexpr (std::is_same_v<E, float>) {
    std::memcpy(to, &value, sizeof(V));
  } else {
    Half<V> half = Rounded(value);
    std::memcpy(to, &half, sizeof(half));
  }
}

// What `Store` leaves of it.
template <class E, class V>
inline V Kept(V value) {
  if constexpr (std::is_same_v<E, float>) return value;
  else return Widened<V>(Rounded(value));
}

// The bits of at most `count` bfloat16; for those behind, zeros are loaded and nothing is stored.
template <class V>
inline Half<V> LoadHalves(const BFloat16* from, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (kLanesOf<V> == 16) return (Half<V>)_mm256_maskz_loadu_epi16((1u << std::min(count, 16)) - 1, from);
#endif
  Half<V> half = {};
  std::memcpy(&half, from, std::min(count, kLanesOf<V>) * sizeof(*from));
  return half;
}

template <class V>
inline void StoreHalves(BFloat16* to, Half<V> half, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (kLanesOf<V> == 16)
    return _mm256_mask_storeu_epi16(to, (1u << std::min(count, 16)) - 1, (__m256i)half);
#endif
  std::memcpy(to, &half, std::min(count, kLanesOf<V>) * sizeof(*to));
}

// At most `count` numbers, likewise.
template <class V, class E>
inline V LoadSome(const E* from, int count) {
  if (count >= kLanesOf<V>) return Load<V>(from);
  if constexpr (std::is_same_v<E, BFloat16>) return Widened<V>(LoadHalves<V>(from, count));
#ifdef __AVX512F__
  if constexpr (kLanesOf<V> == 16 && std::is_same_v<E, float>)
    return (V)_mm512_maskz_loadu_ps((1 << count) - 1, from);
#endif
  E some[kLanesOf<V>] = {};
  std::memcpy(some, from, count * sizeof(E));
  return Load<V>(some);
}

template <class V, class E>
inline void StoreSome(E* to, V value, int count) {
  if (count >= kLanesOf<V>) return Store(to, value);
  if constexpr (std::is_same_v<E, BFloat16>) return StoreHalves<V>(to, Rounded(value), count);
#ifdef __AVX512F__
  if constexpr (kLanesOf<V> == 16 && std::is_same_v<E, float>)
    return _mm512_mask_storeu_ps(to, (1 << count) - 1, (__m512)value);
#endif
  E some[kLanesOf<V>];
  Store(some, value);
  std::memcpy(to, some, count * sizeof(E));
}

// How a vector of channels is loaded and stored: whole, or the last channels of a pixel.
template <class V, bool whole>
struct Lanes {
  int count;

  template <class E>
  V Get(const E* from) const {
    if constexpr (whole) return Load<V>(from);
    else return LoadSome<V>(from, count);
  }
  template <class E>
  void Put(E* to, V value) const {
    if constexpr (whole) Store(to, value);
    else StoreSome(to, value, count);
  }
};

// sweep(first channel, lanes) for all channels.
template <class V = Wide, class F>
inline void ForChannels(int channels, F sweep) {
  int c = 0;
  for (; c + kLanesOf<V> <= channels; c += kLanesOf<V>) sweep(c, Lanes<V, true>{kLanesOf<V>});
  if (c < channels) sweep(c, Lanes<V, false>{channels - c});
}
