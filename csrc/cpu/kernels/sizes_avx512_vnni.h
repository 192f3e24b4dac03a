// Sizes that suit AVX-512 with VNNI, whatever else a processor has: isa_avx512_vnni.cpp,
// isa_avx512_bf16.cpp, and isa_amx*.cpp for products of a few rows.

// Tiles of the matrix products, rows x panels, so that what they sum up fits the 32 registers:
// fused multiply-adds (even and odd sums), and dot products (16-bit codes; 8-bit ones).
constexpr int kRows = 6;
constexpr int kPanels = 2;
constexpr int kDotRows = 3;
constexpr int kDotRowsOnePass = 6;
constexpr int kDotPanels = 4;
constexpr int kPanelsOneRow = 4;  // more panels for one row: enough sums under way at a time
constexpr int kPanelGroup = 4;    // panels whose weights stay in cache while rows pass by
constexpr int kScoreChains = 16;  // query rows x tiles of keys under way at a time
constexpr int kValueRows = 4;     // query rows that share a load of the values
