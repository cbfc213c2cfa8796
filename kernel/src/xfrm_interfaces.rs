//! Network interfaces of the kernel's IPsec that the daemon makes (`ip link ... type xfrm`): what is routed into one is for the
//! policies and SAs with its number, and what they take out of ESP comes from it.
//!
//! Ours are known by their group, which the kernel keeps with each link: a successor removes what a daemon has left that
//! died, and nothing else.

use std::collections::BTreeMap;
use std::io;

use crate::netlink::Netlink;

/// The interfaces that we made.
pub(crate) struct XfrmInterfaces {
    netlink: Netlink,
    /// By name; the number and the link.
    made: BTreeMap<String, (u32, u32)>,
}

impl XfrmInterfaces {
    /// Removes what a predecessor left that died.
    pub(crate) fn new(mut netlink: Netlink) -> io::Result<Self> {
        for (index, name) in netlink.xfrm_links(GROUP)? {
            netlink.link_delete(index)?;
            tracing::info!(name, "removed an XFRM interface that an earlier daemon left");
        }
        Ok(Self { netlink, made: BTreeMap::new() })
    }

    /// Makes those that are wanted (names and numbers), and removes others of ours. What fails is tried again with the next
    /// call.
    pub(crate) fn set(&mut self, wanted: &BTreeMap<String, u32>) -> Vec<(String, io::Error)> {
        let mut failed = Vec::new();
        let gone: Vec<String> = (self.made.iter())
            .filter(|(name, (if_id, _))| wanted.get(*name) != Some(if_id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Err(error) = self.remove(&name) {
                failed.push((name, error));
            }
        }
        for (name, if_id) in wanted {
            if self.made.contains_key(name) {
                continue;
            }
            match self.make(name, *if_id) {
                Ok(index) => {
                    self.made.insert(name.clone(), (*if_id, index));
                }
                Err(error) => failed.push((name.clone(), error)),
            }
        }
        failed
    }

    fn make(&mut self, name: &str, if_id: u32) -> io::Result<u32> {
        self.netlink.add_xfrm_link(name, if_id, GROUP)?;
        let index = self.netlink.link_index(name)?;
        self.netlink.link_up(index).inspect_err(|_| {
            if let Err(error) = self.netlink.link_delete(index) {
                tracing::warn!("{error}");
            }
        })?;
        Ok(index)
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let Some((_, index)) = self.made.get(name) else { return Ok(()) };
        // Somebody may have removed it, and made another of its name.
        if self.netlink.xfrm_links(GROUP)?.iter().any(|(link, _)| link == index) {
            self.netlink.link_delete(*index)?;
        }
        self.made.remove(name);
        Ok(())
    }

    /// Removes all of ours.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        self.set(&BTreeMap::new()).into_iter().map(|(_, error)| error).next().map_or(Ok(()), Err)
    }
}

/// "LtKy".
const GROUP: u32 = 0x4c74_4b79;
