// How tensors lie in memory, as bytes that are equal where they lie alike: shape, strides, dtype, device and alignment, read
// through DLPack's C exchange (dlpack.h 1.2: DLPackExchangeAPI), under Python's lock.
#include <stdint.h>

struct Device { int32_t type, number; };
struct Dtype { uint8_t code, bits; uint16_t lanes; };
struct Tensor { char* data; Device device; int32_t dims; Dtype dtype; int64_t *shape, *strides; uint64_t byte_offset; };
struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void *allocate, *of_object, *to_object;
  int (*describe)(void* object, Tensor*);
};
using Bytes = void* (*)(const char*, long);         // PyBytes_FromStringAndSize

constexpr int DIMS = 8;                             // more have no attention
static const Exchange* exchange;
static Bytes bytes;
static uint64_t aligned;

// Whether this is an exchange that `layouts` understands. alignment: bytes that make a difference.
extern "C" int layouts_begin(const Exchange* offered, Bytes make, long alignment) {
  while (offered && offered->major != 1) offered = offered->older;
  exchange = offered, bytes = make, aligned = alignment;
  return offered != nullptr;
}

// Null with a Python error set where a tensor cannot be described.
extern "C" void* layouts(void* q, void* k, void* v) {
  int64_t facts[3 * (4 + 2 * DIMS)], *at = facts;
  void* objects[] = {q, k, v};
  for (void* object : objects) {
    Tensor t;
    if (exchange->describe(object, &t)) return nullptr;
    const int dims = t.dims < DIMS ? t.dims : DIMS;
    *at++ = t.dims;
    *at++ = int64_t(t.device.type) << 32 | uint32_t(t.device.number);
    *at++ = int64_t(t.dtype.code) << 32 | t.dtype.bits << 16 | t.dtype.lanes;
    *at++ = (reinterpret_cast<uintptr_t>(t.data) + t.byte_offset) % aligned;
    for (int i = 0; i < dims; ++i) *at++ = t.shape[i], *at++ = t.strides[i];
  }
  return bytes(reinterpret_cast<const char*>(facts), (at - facts) * long(sizeof(int64_t)));
}
