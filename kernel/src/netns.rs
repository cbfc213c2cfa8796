//! Network namespaces: whole small networks on one machine, for the demo and for tests.
//!
//! A [`Namespace`] is a host. [`veth`] is a cable between two of them. [`Sandbox`] starts commands in a namespace
//! with files and directories of their own, so that two daemons do not meet in `/run`.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::netlink::{Netlink, Route, Rule, RuleAction, RuleSelector, context};

/// A network namespace. It lives as long as this value, its clones, or a process inside.
#[derive(Clone)]
pub struct Namespace {
    inner: Arc<Inner>,
}

struct Inner {
    file: File,
    /// Where it is mounted, when it has a name.
    path: Option<PathBuf>,
}

impl Namespace {
    /// Makes a namespace without a name, with its loopback up. Needs CAP_SYS_ADMIN.
    pub fn new() -> io::Result<Self> {
        let file = on_thread(make)??;
        let namespace = Self { inner: Arc::new(Inner { file, path: None }) };
        namespace.link_up("lo")?;
        Ok(namespace)
    }

    /// Makes a namespace that `ip netns exec NAME` finds too; the name is freed on drop.
    pub fn named(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("bad namespace name {name:?}")));
        }
        let directory = Path::new("/run/netns");
        std::fs::create_dir_all(directory).map_err(|e| context(e, "make /run/netns"))?;
        let path = directory.join(name);
        File::create_new(&path).map_err(|e| context(e, format!("make {}", path.display())))?;
        let target = path.clone();
        let made = on_thread(move || {
            let file = make()?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &target)
                .map_err(|e| context(e.into(), format!("mount the namespace on {}", target.display())))?;
            Ok::<_, io::Error>(file)
        });
        let file = match made.and_then(|made| made) {
            Ok(file) => file,
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                return Err(e);
            }
        };
        let namespace = Self { inner: Arc::new(Inner { file, path: Some(path) }) };
        namespace.link_up("lo")?;
        Ok(namespace)
    }

    /// The namespace that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        let file = File::open("/proc/thread-self/ns/net").map_err(|e| context(e, "open this network namespace"))?;
        Ok(Self { inner: Arc::new(Inner { file, path: None }) })
    }

    /// Runs `work` on a thread inside the namespace and waits for it. Sockets that it opens stay in the
    /// namespace for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    Ok(work())
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<io::Result<T>> {
        let namespace = self.clone();
        thread::spawn(move || {
            namespace.enter()?;
            Ok(work())
        })
    }

    /// Moves the calling thread into the namespace for good. Threads that it starts are inside as well, so a tokio
    /// runtime made after this call is wholly inside.
    pub fn enter(&self) -> io::Result<()> {
        rustix::thread::move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| context(e.into(), "enter a network namespace (needs CAP_SYS_ADMIN)"))
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Sandbox::new(self).command(program)
    }

    /// Gives a link an address.
    pub fn add_address(&self, link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.netlink(|netlink| {
            let index = netlink.link_index(link)?;
            netlink.add_address(index, address, prefix)
        })
    }

    /// Brings a link up.
    pub fn link_up(&self, link: &str) -> io::Result<()> {
        self.netlink(|netlink| {
            let index = netlink.link_index(link)?;
            netlink.link_up(index)
        })
    }

    /// Sets the MTU of a link.
    pub fn set_mtu(&self, link: &str, mtu: u16) -> io::Result<()> {
        self.netlink(|netlink| {
            let index = netlink.link_index(link)?;
            netlink.link_mtu(index, mtu)
        })
    }

    /// True when there is a link of that name.
    pub fn has_link(&self, link: &str) -> io::Result<bool> {
        self.netlink(|netlink| match netlink.link_index(link) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        })
    }

    /// Adds a route in the main table through a gateway. A prefix of 0 is the default route.
    pub fn add_route(&self, network: IpAddr, prefix: u8, gateway: IpAddr) -> io::Result<()> {
        self.netlink(|netlink| {
            netlink.set_route(&Route {
                network: (network, prefix),
                gateway: Some(gateway),
                link: None,
                source: None,
                table: MAIN_TABLE,
            })
        })
    }

    /// Adds a route in the main table that leads to a link.
    pub fn add_device_route(&self, network: IpAddr, prefix: u8, link: &str) -> io::Result<()> {
        self.netlink(|netlink| {
            let link = Some(netlink.link_index(link)?);
            netlink.set_route(&Route {
                network: (network, prefix),
                gateway: None,
                link,
                source: None,
                table: MAIN_TABLE,
            })
        })
    }

    /// The networks that a route table leads to.
    pub fn routes(&self, table: u32) -> io::Result<Vec<(IpAddr, u8)>> {
        self.netlink(|netlink| netlink.routes(table))
    }

    /// The priorities of the policy routing rules, IPv4 and then IPv6.
    pub fn rule_priorities(&self) -> io::Result<Vec<u32>> {
        self.netlink(Netlink::rule_priorities)
    }

    /// The addresses of the namespace.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        self.netlink(Netlink::addresses)
    }

    /// Forwards packets between links, as a router does.
    pub fn forward(&self) -> io::Result<()> {
        self.run(|| {
            for path in ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"] {
                match std::fs::write(path, "1") {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(context(e, format!("write {path}"))),
                }
            }
            Ok(())
        })?
    }

    /// Loses all UDP that the namespace forwards or sends to other hosts, without a word to the sender, as a
    /// firewall with a drop rule does; or stops doing so. UDP that arrives for the namespace itself is still
    /// received. Leaves nothing behind when switched off.
    pub fn block_udp(&self, on: bool) -> io::Result<()> {
        self.run(|| {
            let mut netlink = Netlink::open()?;
            let rules = [false, true].map(|ipv6| Rule {
                ipv6,
                priority: SINK_PRIORITY,
                action: RuleAction::Lookup(SINK_TABLE),
                selector: RuleSelector::Udp,
            });
            if !on {
                for rule in &rules {
                    netlink.delete_rule(rule)?;
                }
                // Its routes go with it.
                return match netlink.link_index(SINK_LINK) {
                    Ok(index) => netlink.link_delete(index),
                    Err(_) => Ok(()),
                };
            }
            // A blackhole rule would give local senders EINVAL. A link without a carrier swallows all silently.
            let device = tun_rs::DeviceBuilder::new()
                .name(SINK_LINK)
                .build_sync()
                .map_err(|e| context(e, format!("make the link {SINK_LINK}")))?;
            device.persist().map_err(|e| context(e, format!("keep the link {SINK_LINK}")))?;
            drop(device);
            let index = netlink.link_index(SINK_LINK)?;
            for (rule, any) in rules
                .iter()
                .zip([IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)])
            {
                let route =
                    Route { network: (any, 0), gateway: None, link: Some(index), source: None, table: SINK_TABLE };
                match netlink.set_route(&route).and_then(|()| netlink.add_rule(rule)) {
                    Ok(()) => {}
                    Err(e) if rule.ipv6 => tracing::debug!("IPv6 is not blocked: {e}"),
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        })?
    }

    fn netlink<T: Send>(&self, work: impl FnOnce(&mut Netlink) -> io::Result<T> + Send) -> io::Result<T> {
        self.run(|| work(&mut Netlink::open()?))?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A TUN device in a namespace whose packets this process reads and answers itself.
pub struct TunDevice {
    device: tun_rs::SyncDevice,
}

impl TunDevice {
    /// Makes a device and brings it up. It goes with this value.
    pub fn open(namespace: &Namespace, name: &str) -> io::Result<Self> {
        let device = namespace.run(|| tun_rs::DeviceBuilder::new().name(name).build_sync())?;
        Ok(Self { device: device.map_err(|e| context(e, format!("make the TUN device {name}")))? })
    }

    /// Waits for an IP packet that the system sends into the device; gives its length.
    pub fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.device.recv(packet)
    }

    /// Gives the system an IP packet as if it came from the device.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.device.send(packet).map(drop)
    }
}

/// Lays a cable between two namespaces and brings both ends up.
pub fn veth(a: &Namespace, a_link: &str, b: &Namespace, b_link: &str) -> io::Result<()> {
    a.netlink(|netlink| netlink.add_veth(a_link, b.as_fd(), b_link))?;
    a.link_up(a_link)?;
    b.link_up(b_link)
}

/// Makes the calling process root of a user, network and mount namespace of its own, so that an ordinary user can
/// use the rest of this module. The process must have one thread only. Fails where the system forbids it to users.
pub fn become_root_inside() -> io::Result<()> {
    let user = rustix::process::getuid().as_raw();
    let group = rustix::process::getgid().as_raw();
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET | UnshareFlags::NEWNS).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("make a user namespace: {e}; run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces)"),
        )
    })?;
    // user_namespaces(7): without this, an ordinary user may not write gid_map.
    std::fs::write("/proc/self/setgroups", "deny").map_err(|e| context(e, "write /proc/self/setgroups"))?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1")).map_err(|e| context(e, "write /proc/self/uid_map"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1")).map_err(|e| context(e, "write /proc/self/gid_map"))
}

/// A place to run commands: a namespace, with files and directories of its own laid over those of the host.
/// All commands of a sandbox see the same files behind its binds.
#[derive(Clone)]
pub struct Sandbox {
    namespace: Namespace,
    binds: Vec<(PathBuf, PathBuf)>,
    empty: Vec<PathBuf>,
}

impl Sandbox {
    /// The host's files, in this namespace.
    pub fn new(namespace: &Namespace) -> Self {
        Self { namespace: namespace.clone(), binds: Vec::new(), empty: Vec::new() }
    }

    /// Shows `source` at `target`; both must exist and be of one kind, file or directory.
    #[must_use]
    pub fn bind(mut self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        self.binds.push((source.into(), target.into()));
        self
    }

    /// Gives each command an empty directory of its own at `target` (a tmpfs), which must exist. Empty directories
    /// come before the binds.
    #[must_use]
    pub fn empty(mut self, target: impl Into<PathBuf>) -> Self {
        self.empty.push(target.into());
        self
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = self.namespace.clone();
        let binds: Vec<_> = self.binds.iter().map(|(source, target)| (c_string(source), c_string(target))).collect();
        let empty: Vec<_> = self.empty.iter().map(|target| c_string(target)).collect();
        let enter = move || -> io::Result<()> {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            if binds.is_empty() && empty.is_empty() {
                return Ok(());
            }
            unshare(UnshareFlags::NEWNS)?;
            // Nothing that is mounted here may show outside.
            rustix::mount::mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
            for target in empty.iter() {
                let target = target.as_deref().ok_or(rustix::io::Errno::INVAL)?;
                rustix::mount::mount(c"tmpfs", target, c"tmpfs", MountFlags::NOSUID | MountFlags::NODEV, None)?;
            }
            for (source, target) in binds.iter() {
                let source = source.as_deref().ok_or(rustix::io::Errno::INVAL)?;
                let target = target.as_deref().ok_or(rustix::io::Errno::INVAL)?;
                rustix::mount::mount_bind_recursive(source, target)?;
            }
            Ok(())
        };
        // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are
        // allowed. It makes plain system calls (setns, unshare, mount) on strings made beforehand, allocates
        // nothing (errors are bare error numbers) and takes no lock.
        #[allow(unsafe_code, reason = "the only way to act between fork and exec")]
        unsafe {
            command.pre_exec(enter);
        }
        command
    }
}

/// Makes a namespace and moves the calling thread in.
fn make() -> io::Result<File> {
    unshare(UnshareFlags::NEWNET).map_err(|e| {
        io::Error::new(e.kind(), format!("make a network namespace: {e}; run as root or with CAP_SYS_ADMIN"))
    })?;
    File::open("/proc/thread-self/ns/net").map_err(|e| context(e, "open the new network namespace"))
}

fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    thread::Builder::new().spawn(work)?.join().map_err(|_| io::Error::other("a helper thread panicked"))
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: unshare is unsafe because of CLONE_FILES, which could pull file descriptors away from under other
    // threads' borrows. No caller in this module passes it.
    #[allow(unsafe_code, reason = "rustix marks unshare unsafe for a flag that is not used here")]
    unsafe {
        rustix::thread::unshare_unsafe(flags)?;
    }
    Ok(())
}

fn c_string(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

const MAIN_TABLE: u32 = 254;
const SINK_LINK: &str = "lk-sink";
const SINK_TABLE: u32 = 0x6c6b;
const SINK_PRIORITY: u32 = 1;
