//! Filters of traffic control that somebody else has put at an interface's ingress, or at its egress by the same queueing
//! discipline (clsact): the redirect takes its place, for an interface has one. What is at the root of the interface stays,
//! and frames of the guest pass it.

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterMatchAll, TcMessage};

use super::NetworkError;
use super::links::Link;
use super::unsupported::Unsupported;

/// The filters that are not of [`super::redirect`], which a shim that was killed may have left.
pub async fn foreign(handle: &Handle, link: &Link) -> Result<Option<Unsupported>, NetworkError> {
    let index = i32::try_from(link.index).unwrap_or(0);
    let failed = |source| NetworkError::Netlink { what: "list the pod's filters", source };
    let mut filters = handle.traffic_filter(index);
    let at: [Vec<TcMessage>; 2] = [
        filters.get().ingress().execute().try_collect().await.map_err(failed)?,
        filters.get().egress().execute().try_collect().await.map_err(failed)?,
    ];
    let foreign = at.iter().flatten().filter_map(kind).find(|kind| *kind != TcFilterMatchAll::KIND);
    Ok(foreign.map(|kind| Unsupported {
        what: format!("a filter of traffic control ({kind}) at the ingress of {}", link.name),
        security: true,
    }))
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}
