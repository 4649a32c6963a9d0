// What an array is made of: float32, or bfloat16, which is read into float32 vectors and rounded when it is written.

#pragma once

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

typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) {
  uint32_t bits = (uint32_t)value.bits << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

template <class E>
inline E FromFloat(float value) {
  if constexpr (sizeof(E) == sizeof(float)) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return BFloat16{(uint16_t)(bits >> 16 | 0x40)};
    return BFloat16{(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, of two the even one
  }
}

// Sixteen numbers in a row.
inline Vec16 Load16(const float* from) { return Load<Vec16>(from); }

inline Vec16 Load16(const BFloat16* from) {
#ifdef __AVX512F__
  return (Vec16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  Half16 half;
  std::memcpy(&half, from, sizeof(half));
  return (Vec16)(__builtin_convertvector(half, Bits16) << 16);
#endif
}

inline void Store16(float* to, Vec16 value) { Store(to, value); }

inline void Store16(BFloat16* to, Vec16 value) {
#ifdef __AVX512BF16__
  __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &half, sizeof(half));
#else
  Bits16 bits = (Bits16)value;
  Bits16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Bits16 quiet = bits >> 16 | 0x40;
  Bits16 chosen = (Bits16)(value == value) & rounded | ~(Bits16)(value == value) & quiet;
  Half16 half = __builtin_convertvector(chosen, Half16);
  std::memcpy(to, &half, sizeof(half));
#endif
}
