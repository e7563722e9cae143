#pragma once

#include <cstdint>

namespace digits {

inline constexpr int kGlyphWidth = 5;
inline constexpr int kGlyphHeight = 7;

/// Row `row` of a character's 5x7 picture, the leftmost pixel in bit 4. Letters are upper case; has A-Z, 0-9, space
/// and _ - . =, and a filled box for everything else.
std::uint8_t glyph_row(char character, int row);

}  // namespace digits
