//! Lies on standard streams.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Result;
use bulkhead_protocol::stdio::{ACCEPTED, REFUSED, Stream, decode, decode_length};

use super::guest::{Guest, forever};

/// One stream to its end.
pub(super) fn serve(guest: &Arc<Guest>, mut connection: UnixStream) -> Result<()> {
    let mut prefix = [0; 2];
    connection.read_exact(&mut prefix)?;
    let mut body = vec![0; decode_length(prefix)?];
    connection.read_exact(&mut body)?;
    let header = decode(&body)?;
    let place = if header.stream == Stream::Stdin { "stdin" } else { "stdout" };
    let lie = guest.lies(place).next().unwrap_or_default().to_owned();
    match lie.as_str() {
        "refused" => return Ok(connection.write_all(&[REFUSED])?),
        "odd" => return Ok(connection.write_all(&[0xa5; 4096])?),
        "close" => return Ok(()),
        "silent" => forever(),
        "exit" => std::process::exit(1),
        _ => connection.write_all(&[ACCEPTED])?,
    }
    if lie == "flood" {
        flood(&mut connection);
    }
    if header.stream == Stream::Stdin {
        std::io::copy(&mut connection, &mut std::io::sink())?;
        return Ok(());
    }
    connection.write_all(b"hello\n")?;
    guest.wait(&(header.container_id, header.exec_id));
    match lie.as_str() {
        "stays" => forever(),
        "flood-after" => flood(&mut connection),
        // A byte now and then, so that it is never silent.
        "trickle" => loop {
            connection.write_all(b".")?;
            std::thread::sleep(std::time::Duration::from_secs(1));
        },
        _ => Ok(()),
    }
}

/// Writes for ever.
fn flood(connection: &mut UnixStream) -> ! {
    while connection.write_all(&[b'x'; 64 << 10]).is_ok() {}
    forever()
}
