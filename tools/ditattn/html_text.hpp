#pragma once

#include <string>
#include <string_view>

#include "tools/ditattn/output.hpp"
#include "tools/ditattn/table.hpp"

namespace ditattn::cli {

/// `text` as HTML's text or as an attribute's value in double quotes; control characters are '?'.
std::string escaped(std::string_view text);

/// `<tag class="…">text</tag>`, the text escaped.
std::string element(const char* tag, std::string_view css_class, std::string_view text);

/// A table that scrolls in itself where it is too wide.
std::string table_html(const Table& table);

/// `<script type="application/json" id="ID">`: the document, in which no text can end the element.
std::string json_html(const char* id, const Json& document);

/// The class of a back end's colour and marker: the same in every report, `kBackendSlots` different ones.
std::string backend_class(std::string_view backend);

/// The number in `backend_class`: known members have their own, all others share the last.
int backend_slot(std::string_view backend);
inline constexpr int kBackendSlots = 8;

}  // namespace ditattn::cli
