//! Optional protection (RFC 5660 §3.1) with real daemons: connections that go in clear although the policy protects them, and
//! what the wires show of them.

#![allow(clippy::unwrap_used, reason = "tests")]

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::optional;

#[test]
fn what_may_goes_in_clear_and_nothing_else_does() {
    optional::what_may_goes_in_clear_and_nothing_else_does(Latchkey);
}

#[test]
fn a_killed_daemon_s_successor_closes_what_went_in_clear() {
    optional::a_killed_daemon_s_successor_closes_what_went_in_clear(Latchkey);
}
