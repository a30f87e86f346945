//! Frames from one interface to another: an ingress qdisc, a filter that matches everything, and the mirred action with
//! a redirect to the other's egress (tc(8), tc-matchall(8), tc-mirred(8)).

use futures::StreamExt;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};
use rtnetlink::{Error, Handle};

/// `ETH_P_ALL` of linux/if_ether.h.
const ETH_P_ALL: u16 = 3;

/// The handle of an ingress qdisc.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };

/// Sends every frame that enters `from` out of `to`.
pub async fn add(handle: &Handle, from: u32, to: u32) -> Result<(), Error> {
    let index = i32::try_from(from).map_err(|_| Error::RequestFailed)?;
    handle.qdisc().add(index).ingress().execute().await?;
    request(handle, RouteNetlinkMessage::NewTrafficFilter(filter(index, to)), NLM_F_CREATE | NLM_F_EXCL).await
}

/// Removes what [`add`] made on an interface. That nothing is there is no error.
pub async fn remove(handle: &Handle, index: u32) {
    let Ok(index) = i32::try_from(index) else { return };
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS;
    let _ = request(handle, RouteNetlinkMessage::DelQueueDiscipline(message), 0).await;
}

fn filter(index: i32, to: u32) -> TcMessage {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = TcMessage::with_index(index);
    message.header.parent = INGRESS;
    // tc's `info` is the priority, which the kernel chooses when it is zero, and the protocol in network order.
    message.header.info = u32::from(TcHandle { major: 0, minor: ETH_P_ALL.to_be() });
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    message
}

async fn request(handle: &Handle, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_core::Emitable;

    #[test]
    fn filter_is_what_tc_sends() {
        let message = filter(5, 7);
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        // struct tcmsg: ifindex 5, handle 0, parent ffff:0, info with ETH_P_ALL in network order.
        assert_eq!(bytes[4..8], 5u32.to_ne_bytes());
        assert_eq!(bytes[12..16], 0xffff_0000u32.to_ne_bytes());
        assert_eq!(bytes[16..20], [0, 3, 0, 0]);
        // struct tc_mirred ends the message: action stolen (4) ... eaction redirect (1), ifindex 7.
        assert_eq!(bytes[bytes.len() - 8..], [1u32.to_ne_bytes(), 7u32.to_ne_bytes()].concat());
    }
}
