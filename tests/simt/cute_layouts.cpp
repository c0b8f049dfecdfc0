// cute_layouts.cpp - prints what CuTe says of wgmma's layouts, for tests/test_cute.py to compare; nothing else uses
// CuTe.
//
//   d N            64 row + column of register r of thread t          a            row + 64 column of the same
//   k|mn SPAN      leading and stride bytes of the descriptor, then the byte of element (mn, k), k varying fastest
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <iostream>

using namespace cute;
using T = cute::half_t;

template <typename Layout>
void fragment(const char* name, int n, Layout layout, int registers) {
  std::cout << name << ' ' << n;
  for (int t = 0; t < 128; ++t)
    for (int r = 0; r < registers; ++r) std::cout << ' ' << int(layout(t, r));
  std::cout << '\n';
}

template <SM90::GMMA::Major MAJOR, typename Atom>
void matrix(const char* name, int span, Atom atom) {
  alignas(1024) static T memory[128 * 64];
  const auto whole = make_tensor(make_smem_ptr(memory), tile_to_shape(atom, Shape<_128, _64>{}));
  const auto tensor = local_tile(whole, Shape<_128, _16>{}, make_coord(0, 0));
  const GmmaDescriptor desc = SM90::GMMA::make_gmma_desc<MAJOR>(tensor);
  std::cout << name << ' ' << span << ' ' << desc.bitfield.leading_byte_offset_ * 16 << ' '
            << desc.bitfield.stride_byte_offset_ * 16;
  for (int mn = 0; mn < 128; ++mn)
    for (int k = 0; k < 16; ++k)
      std::cout << ' ' << reinterpret_cast<char*>(&tensor(mn, k)) - reinterpret_cast<char*>(memory);
  std::cout << '\n';
}

int main() {
  using namespace SM90::GMMA;
  fragment("d", 64, CLayout_64xN<64>{}, 32);
  fragment("d", 80, CLayout_64xN<80>{}, 40);
  fragment("d", 128, CLayout_64xN<128>{}, 64);
  fragment("a", 0, ALayout_64x16{}, 8);
  matrix<Major::K>("k", 16, Layout_K_INTER_Atom<T>{});
  matrix<Major::K>("k", 32, Layout_K_SW32_Atom<T>{});
  matrix<Major::K>("k", 64, Layout_K_SW64_Atom<T>{});
  matrix<Major::K>("k", 128, Layout_K_SW128_Atom<T>{});
  matrix<Major::MN>("mn", 16, Layout_MN_INTER_Atom<T>{});
  matrix<Major::MN>("mn", 32, Layout_MN_SW32_Atom<T>{});
  matrix<Major::MN>("mn", 64, Layout_MN_SW64_Atom<T>{});
  matrix<Major::MN>("mn", 128, Layout_MN_SW128_Atom<T>{});
}
