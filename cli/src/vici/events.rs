//! The core's events as VICI's: `log`, `ike-updown`, `child-updown`, `ike-rekey`, `child-rekey`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ike::engine::{ChildSaId, CloseReason, Event, IkeSaId, IkeSaStatus};
use tokio::sync::broadcast;

use crate::control::SaReport;
use crate::tree::Section;
use crate::vici::report;
use crate::vici::server::Shared;

/// IKE SAs that ended, kept for the events of their Child SAs that come after.
const MAX_ENDED: usize = 64;

/// An event for all clients that are registered for it.
#[derive(Debug)]
pub(super) struct Announcement {
    pub(super) event: &'static str,
    pub(super) message: Section,
}

const ANNOUNCED: [&str; 7] = ["log", "ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey", "alert"];
const STREAMED: [&str; 6] = ["control-log", "list-sa", "list-policy", "list-conn", "list-cert", "list-authority"];

/// True for the events that a client may register for.
pub(super) fn is_event(name: &str) -> bool {
    is_announced(name) || STREAMED.contains(&name)
}

/// True for events that go to all clients that are registered.
pub(super) fn is_announced(name: &str) -> bool {
    ANNOUNCED.contains(&name)
}

/// Turns events of the core into announcements, for ever.
pub(super) async fn translate(shared: Arc<Shared>) {
    let mut events = shared.control.events();
    let mut ended = VecDeque::new();
    loop {
        match events.recv().await {
            Ok(event) => {
                if let Event::IkeDown(status, _) = event.as_ref() {
                    if ended.len() == MAX_ENDED {
                        ended.pop_front();
                    }
                    ended.push_back(status.as_ref().clone());
                }
                if shared.listeners.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                if let Some(announcement) = announcement(&shared, &event, &ended).await {
                    let _ = shared.announcements.send(Arc::new(announcement));
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::debug!(missed, "VICI missed events of the core");
            }
            // The core is gone; commands say so.
            Err(broadcast::error::RecvError::Closed) => return std::future::pending().await,
        }
    }
}

async fn announcement(shared: &Shared, event: &Event, ended: &VecDeque<IkeSaStatus>) -> Option<Announcement> {
    match event {
        Event::Log { group, level, ike_sa, message } => {
            // charon sends levels 0 and 1 only.
            let message = (*level <= 1).then(|| log(group, *level, ike_sa.as_ref(), message, true))?;
            Some(Announcement { event: "log", message })
        }
        Event::IkeUp(id) => {
            let report = shared.control.ike_sa(*id).await;
            Some(ike_updown(status(report.as_ref(), ended, *id)?, true))
        }
        // Its successor is up: charon announces the rekeying alone.
        Event::IkeDown(_, CloseReason::Rekeyed) => None,
        Event::IkeDown(status, _) => Some(ike_updown(status, false)),
        Event::ChildUp(id, child) => {
            let report = shared.control.ike_sa(*id).await?;
            let section = child_of(&report, *child)?;
            Some(child_updown(&report.status, section, true))
        }
        Event::ChildDown { ike_sa, child, .. } => {
            let report = shared.control.ike_sa(*ike_sa).await;
            let status = status(report.as_ref(), ended, *ike_sa)?;
            let section = report::wrapped(&report::child_name(child), report::child_sa(child, None));
            Some(child_updown(status, section, false))
        }
        Event::IkeRekeyed { old, new } => {
            let reports = (shared.control.ike_sa(*old).await, shared.control.ike_sa(*new).await);
            let new = status(reports.1.as_ref(), ended, *new)?;
            let mut both = report::message();
            if let Some(old) = status(reports.0.as_ref(), ended, *old) {
                both.push_section("old", report::ike_sa_without_children(old));
            }
            both.push_section("new", report::ike_sa_without_children(new));
            let message = report::wrapped(&new.connection, both);
            Some(Announcement { event: "ike-rekey", message })
        }
        Event::ChildRekeyed { ike_sa, old, new } => {
            let report = shared.control.ike_sa(*ike_sa).await?;
            let child = |id: &ChildSaId| report.status.children.iter().find(|child| child.id == *id);
            let new = child(new)?;
            let mut both = report::message();
            if let Some(old) = child(old) {
                both.push_section("old", report::child_sa(old, None));
            }
            both.push_section("new", report::child_sa(new, None));
            let mut section = report::ike_sa_without_children(&report.status);
            section.push_section("child-sas", report::wrapped(&new.name, both));
            let message = report::wrapped(&report.status.connection, section);
            Some(Announcement { event: "child-rekey", message })
        }
        Event::Assigned(..)
        | Event::ChildRetired { .. }
        | Event::Migrate { .. }
        | Event::Failed { .. }
        | Event::Done { .. } => None,
    }
}

/// Of an IKE SA that lives, or did just now.
fn status<'a>(living: Option<&'a SaReport>, ended: &'a VecDeque<IkeSaStatus>, id: IkeSaId) -> Option<&'a IkeSaStatus> {
    living.map(|report| &report.status).or_else(|| ended.iter().find(|status| status.id == id))
}

fn child_of(report: &SaReport, id: ChildSaId) -> Option<Section> {
    let at = report.status.children.iter().position(|child| child.id == id)?;
    let child = report.status.children.get(at)?;
    let usage = report.usage.get(at).copied().flatten();
    Some(report::wrapped(&report::child_name(child), report::child_sa(child, usage)))
}

fn ike_updown(status: &IkeSaStatus, up: bool) -> Announcement {
    let section = report::ike_sa_without_children(status);
    Announcement { event: "ike-updown", message: updown(status, section, up) }
}

fn child_updown(status: &IkeSaStatus, children: Section, up: bool) -> Announcement {
    let mut section = report::ike_sa_without_children(status);
    section.push_section("child-sas", children);
    Announcement { event: "child-updown", message: updown(status, section, up) }
}

fn updown(status: &IkeSaStatus, section: Section, up: bool) -> Section {
    let mut message = report::message();
    if up {
        message.push_value("up", "yes");
    }
    message.push_section(status.connection.as_str(), section);
    message
}

/// A line of the log; `control-log` has no thread.
pub(super) fn log(
    group: &str,
    level: i8,
    ike_sa: Option<&(IkeSaId, String)>,
    text: &str,
    with_thread: bool,
) -> Section {
    let mut message = report::message();
    message.push_value("group", group);
    message.push_value("level", level.to_string());
    if with_thread {
        message.push_value("thread", "0");
    }
    if let Some((id, name)) = ike_sa {
        message.push_value("ikesa-name", name.as_str());
        message.push_value("ikesa-uniqueid", id.0.to_string());
    }
    message.push_value("msg", text);
    message
}
