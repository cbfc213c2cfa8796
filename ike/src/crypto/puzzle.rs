//! Puzzles (RFC 8019 §7.1.3, §7.2.3): find four different keys of one size under which the PRF of a given string ends
//! in a given number of zero bits.

use ipsec::transform::Prf;

use super::prf::{prf, prf_len};

/// How many keys a solution has.
const KEYS: usize = 4;
/// Octets of each key that we try. A counter of this size never runs out: the effort is less.
const KEY: usize = 4;
/// Most difficult puzzle that may be configured: about a quarter of an hour of a fast processor.
pub const MAX_DIFFICULTY: u8 = 28;
/// Least difficult one that a responder may set (§4.4 excludes 1 to 8).
pub const MIN_DIFFICULTY: u8 = 9;
/// Where the responder leaves the difficulty to us (§7.1.1.1).
const OWN_DIFFICULTY: u8 = 16;

/// A puzzle that a responder set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Puzzle {
    /// The PRF.
    pub prf: Prf,
    /// Zero bits that each result must end in; 0 leaves it to the initiator.
    pub difficulty: u8,
    /// What the PRF is computed over: the cookie in IKE_SA_INIT, `Nr | SPIr` in IKE_AUTH.
    pub input: Vec<u8>,
}

impl Puzzle {
    /// A job's work: the solution's octets, or `None` when it was not found within the effort that its difficulty
    /// makes likely (eight times the average), or the PRF is not ours. Takes about `4 << difficulty` PRFs.
    pub fn solve(&self) -> Option<Vec<u8>> {
        let difficulty = if self.difficulty == 0 { OWN_DIFFICULTY } else { self.difficulty.min(MAX_DIFFICULTY) };
        let effort = 32_u64 << difficulty;
        let mut solution = Vec::with_capacity(KEYS * KEY);
        for key in (0..u32::MAX).zip(0..effort).map(|(key, _)| key.to_be_bytes()) {
            if self.zero_bits(&key)? >= u32::from(difficulty) {
                solution.extend_from_slice(&key);
                if solution.len() == KEYS * KEY {
                    return Some(solution);
                }
            }
        }
        None
    }

    /// The number of zero bits that a solution was found for: the smallest of all keys (§7.1.4). `None` where it is
    /// none: too few bits, keys that repeat, or of a size that the PRF has not (§8.2).
    pub fn verify(&self, solution: &[u8]) -> Option<u32> {
        let size = solution.len() / KEYS;
        if size == 0 || solution.len() != size * KEYS || size > prf_len(self.prf)? {
            return None;
        }
        let keys: Vec<&[u8]> = solution.chunks_exact(size).collect();
        let different = keys.iter().enumerate().all(|(index, key)| !keys.iter().skip(index + 1).any(|k| k == key));
        if !different {
            return None;
        }
        let mut least = u32::MAX;
        for key in keys {
            least = least.min(self.zero_bits(key)?);
        }
        (least >= u32::from(self.difficulty)).then_some(least)
    }

    fn zero_bits(&self, key: &[u8]) -> Option<u32> {
        let result = prf(self.prf, key, &[&self.input]).ok()?;
        Some(trailing_zero_bits(result.expose()))
    }
}

fn trailing_zero_bits(octets: &[u8]) -> u32 {
    let mut bits = 0;
    for octet in octets.iter().rev() {
        bits += octet.trailing_zeros().min(8);
        if *octet != 0 {
            break;
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cookie of RFC 8019's examples (§4.4).
    const COOKIE: [u8; 20] = [
        0x73, 0x9a, 0xe7, 0x49, 0x2d, 0x8a, 0x81, 0x0c, 0xf5, 0xe8, 0xdc, 0x0f, 0x96, 0x26, 0xc9, 0xdd, 0xa7, 0x73,
        0xc5, 0xa3,
    ];

    fn puzzle(difficulty: u8) -> Puzzle {
        Puzzle { prf: Prf::HMAC_SHA2_256, difficulty, input: COOKIE.to_vec() }
    }

    // RFC 8019 §4.4, Table 1: what counts as zero bits. Its keys do not give these results with the cookie that is
    // printed there, so the PRF itself is checked below.
    #[test]
    fn zero_bits_are_counted_as_in_the_example() {
        let results: [u128; 4] = [
            0xe4f9_57b8_59d7_fb13_43b7_b94a_816c_0000,
            0x0d42_33d6_278c_96e3_3692_27a0_7580_0000,
            0x952a_35d3_9d5b_a067_09da_43af_4070_0000,
            0x5a04_52b2_1571_e401_a3d0_0803_679c_0000,
        ];
        assert_eq!(results.map(|result| trailing_zero_bits(&result.to_be_bytes())), [18, 23, 20, 18]);
        assert_eq!(trailing_zero_bits(&[0; 20]), 160);
    }

    // RFC 8019 §7.1.3. The first keys of four octets, as Python's hmac module finds them.
    #[test]
    fn a_puzzle_is_solved_as_others_solve_it() {
        let keys = [223_u32, 10423, 11985, 13322].map(u32::to_be_bytes);
        assert_eq!(puzzle(12).solve().as_deref(), Some(keys.as_flattened()));
        assert_eq!(puzzle(12).verify(keys.as_flattened()), Some(12));
        assert_eq!(puzzle(12 + 1).verify(keys.as_flattened()), None);
    }

    // RFC 8019 §8.2: four different keys of one size between 1 octet and the PRF's preferred one.
    #[test]
    fn what_is_no_solution_is_refused() {
        let solution = puzzle(9).solve().unwrap();
        assert!(puzzle(9).verify(&solution).is_some());
        assert!(puzzle(0).verify(&solution).is_some_and(|bits| bits >= 9));
        assert_eq!(puzzle(9).verify(&[]), None);
        assert_eq!(puzzle(9).verify(&solution[..15]), None);
        assert_eq!(puzzle(9).verify(&solution[..12]), None);
        let same = [&solution[..4], &solution[..4], &solution[..4], &solution[..4]].concat();
        assert_eq!(puzzle(9).verify(&same), None);
        let twice = [&solution[..12], &solution[..4]].concat();
        assert_eq!(puzzle(9).verify(&twice), None);
        assert_eq!(Puzzle { input: vec![1], ..puzzle(9) }.verify(&solution), None);
        assert_eq!(Puzzle { prf: Prf::HMAC_SHA2_512, ..puzzle(9) }.verify(&solution), None);
        assert_eq!(Puzzle { prf: Prf(60_000), ..puzzle(9) }.verify(&solution), None);
        assert_eq!(Puzzle { prf: Prf(60_000), ..puzzle(9) }.solve(), None);
        assert_eq!(puzzle(0).verify(&[0; 4 * 33]), None);
        assert_eq!(puzzle(0).verify(&[0; 65_535]), None);
    }
}
