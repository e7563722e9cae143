#pragma once

#include <string>

#include "tools/ditattn/report_context.hpp"

namespace ditattn::cli {

/// The comparison as one self-contained page: nothing is loaded from elsewhere, nothing runs. It embeds the document of
/// `compare --json` as the JSON of `<script id="ditattn-comparison">`.
std::string html_report(const Comparison& comparison, const ReportContext& context);

}  // namespace ditattn::cli
