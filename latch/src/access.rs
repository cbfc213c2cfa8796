//! Who may ask for what: rights by user and group, as the system tells them of who connects (SO_PEERCRED, SO_PEERGROUPS).
//!
//! What nobody needs a right for is what is one's own: to ask by a socket who is at its other end, and to see the latches of
//! one's own user. Root, and the user that the daemon runs as, have all rights.

use std::collections::BTreeSet;
use std::fmt;

/// What one may be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Latch connections whose sockets one has.
    Latch,
    /// Latch listeners whose sockets one has, and take the latches of what they accept.
    Listen,
    /// Have SAs made for a latch.
    Initiate,
    /// See latches of other users, and ask by addresses, without a socket, who is there.
    See,
    /// Break and close latches of others.
    Manage,
    /// Have connections whose sockets one has go in clear although they would be protected (RFC 5660 §3.1).
    Bypass,
}

/// Whom a right is given to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// Whoever may write to the daemon's socket.
    pub everybody: bool,
    /// Users by number.
    pub users: BTreeSet<u32>,
    /// Groups by number; a user's supplementary groups count.
    pub groups: BTreeSet<u32>,
}

/// Who has which right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// [`Right::Latch`].
    pub latch: Grant,
    /// [`Right::Listen`].
    pub listen: Grant,
    /// [`Right::Initiate`].
    pub initiate: Grant,
    /// [`Right::See`].
    pub see: Grant,
    /// [`Right::Manage`].
    pub manage: Grant,
    /// [`Right::Bypass`].
    pub bypass: Grant,
}

/// Who has connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User by number; `None` where the system does not say.
    pub user: Option<u32>,
    /// Groups by number, the supplementary ones included.
    pub groups: BTreeSet<u32>,
    /// Root, or the user that the daemon runs as.
    pub privileged: bool,
}

impl Grant {
    /// To whoever may write to the daemon's socket.
    pub fn everybody() -> Self {
        Self { everybody: true, ..Self::default() }
    }
}

impl Default for Access {
    /// Who may write to the daemon's socket may latch what is his; nobody sees or manages what is another's, or goes around the policy.
    fn default() -> Self {
        let everybody = Grant::everybody;
        Self { latch: everybody(), listen: everybody(), initiate: everybody(), ..Self::none() }
    }
}

impl Access {
    /// Root and the daemon's user alone.
    pub fn none() -> Self {
        let nobody = Grant::default;
        Self {
            latch: nobody(),
            listen: nobody(),
            initiate: nobody(),
            see: nobody(),
            manage: nobody(),
            bypass: nobody(),
        }
    }

    /// The grant of a right.
    pub fn grant(&self, right: Right) -> &Grant {
        match right {
            Right::Latch => &self.latch,
            Right::Listen => &self.listen,
            Right::Initiate => &self.initiate,
            Right::See => &self.see,
            Right::Manage => &self.manage,
            Right::Bypass => &self.bypass,
        }
    }

    /// The grant of a right, to be changed.
    pub fn grant_mut(&mut self, right: Right) -> &mut Grant {
        match right {
            Right::Latch => &mut self.latch,
            Right::Listen => &mut self.listen,
            Right::Initiate => &mut self.initiate,
            Right::See => &mut self.see,
            Right::Manage => &mut self.manage,
            Right::Bypass => &mut self.bypass,
        }
    }

    /// True when who has connected has a right.
    pub fn allows(&self, who: &Credentials, right: Right) -> bool {
        let Grant { everybody, users, groups } = self.grant(right);
        who.privileged
            || *everybody
            || who.user.is_some_and(|user| users.contains(&user))
            || who.groups.iter().any(|group| groups.contains(group))
    }
}

impl Right {
    /// All that there are.
    pub const ALL: [Self; 6] = [Self::Latch, Self::Listen, Self::Initiate, Self::See, Self::Manage, Self::Bypass];
}

impl fmt::Display for Right {
    /// The name of its setting in `latch_access`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Latch => "latch",
            Self::Listen => "listen",
            Self::Initiate => "initiate",
            Self::See => "see",
            Self::Manage => "manage",
            Self::Bypass => "bypass",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(user: Option<u32>, groups: &[u32]) -> Credentials {
        Credentials { user, groups: groups.iter().copied().collect(), privileged: false }
    }

    // RFC 5660 §2: "limited by … the privileges of the caller".
    #[test]
    fn a_right_is_for_whom_it_names_and_for_the_privileged() {
        let grant = Grant { everybody: false, users: [7].into(), groups: [70].into() };
        let access = Access { manage: grant, ..Access::default() };
        let stranger = who(Some(8), &[7, 80]);
        assert!(!access.allows(&stranger, Right::Manage), "a group's number is no user's");
        assert!(!access.allows(&who(None, &[]), Right::Manage));
        assert!(access.allows(&who(Some(7), &[]), Right::Manage));
        assert!(access.allows(&who(Some(8), &[80, 70]), Right::Manage));
        let mine = [Right::Latch, Right::Listen, Right::Initiate];
        assert!(mine.iter().all(|right| access.allows(&who(None, &[]), *right)));
        assert!(!access.allows(&stranger, Right::See) && !access.allows(&who(Some(7), &[70]), Right::Bypass));
        let privileged = Credentials { privileged: true, ..stranger.clone() };
        assert!(Right::ALL.iter().all(|right| Access::none().allows(&privileged, *right)));
        assert!(!Right::ALL.iter().any(|right| Access::none().allows(&stranger, *right)));
    }
}
