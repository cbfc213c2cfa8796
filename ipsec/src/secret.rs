//! Bytes that must not leak: wiped on drop, never printed, compared in constant time.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Key material. It has no `Clone`, `Display` or `PartialEq`; its `Debug` prints the length only.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes ownership of key material.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Shows the octets, for handing to a cryptographic primitive or the kernel only.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Makes a second copy; named so that a reader of the caller sees that secrets multiply here.
    pub fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }

    /// Compares in constant time (lengths are not secret).
    pub fn matches(&self, other: &[u8]) -> bool {
        self.0.ct_eq(other).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} octets)", self.0.len())
    }
}
