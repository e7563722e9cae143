#pragma once

namespace ditattn {

/// Makes every member resolve its class again. Called when the class behind a path changes.
void forget_resolved_members();

}  // namespace ditattn
