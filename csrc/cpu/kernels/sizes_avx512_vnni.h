// Sizes that suit AVX-512 with VNNI, whatever else a processor has: isa_avx512_vnni.cpp,
// isa_avx512_bf16.cpp, and isa_amx*.cpp for products of a few rows.

constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;
constexpr int kPanelGroup = 4;
constexpr int kScoreChains = 16;
constexpr int kValueRows = 4;
